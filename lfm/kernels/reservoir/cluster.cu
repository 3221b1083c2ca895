// One sweep of the chunked reservoir recurrence, forward or backward, in one launch (sm_90a).
//
// A cluster of CS thread blocks advances COLUMNS chunks of one reservoir through warmup + length steps.  Block k owns
// U = N/CS units and keeps its U x N slice of W in registers.  After each step it sends the U new values of every
// column to all blocks of the cluster, into one of two buffers; an mbarrier per buffer counts the bytes that landed.
// Clusters never wait for each other, so a grid may have more of them than the device holds at once.
//
// Chunks are counted along the chain (chunk 0 starts from the given state), and so is time: position tau of the chain
// is t = tau forward and t = T - 1 - tau backward.  README.md has the equations and the picture.
//
// What is summed, and in which order, depends neither on COLUMNS nor on the column a chunk sits in: results are the
// same bits in every batch.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef CLUSTER_SIZE
#define CLUSTER_SIZE 4
#endif

namespace {

using bf16 = __nv_bfloat16;

constexpr int RING = 4;     // input rows in flight: this step's and the next three
constexpr int CHAINS = 2;   // independent accumulators per output tile
constexpr int PAD = 8;      // after each row in shared memory: ldmatrix then meets no bank conflict
constexpr int LIVE = 1, CUT = 2;

// T positions of B sequences, [B, T, R, N] bf16; recorded and given states [B, chunks, R, N] and [B, R, N] fp32.
struct Sweep {
  const bf16* weight;          // [R, N, N]; transposed for the backward
  const bf16* input;           // drive, or the gradient of the states
  const bf16* gain;            // backward only
  bf16* output;                // states, or delta
  bf16* gain_output;           // forward only; may be null
  const float* initial;        // before position 0 of the chain; null is zero
  const float* starts;         // of every chunk, in place of a warm-up; null outside repairs
  const unsigned char* reset;  // [B, T]; null is no reset
  float* start_output;         // what each chunk carried into its first own position
  float* end_output;           // what it carried out of its last one
  int num_positions, num_reservoirs, length, warmup, num_chunks, num_columns;
  float leak_rate;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t peer_address(uint32_t address, int peer) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(peer));
  return mapped;
}

__device__ __forceinline__ void load_matrices(uint32_t* tile, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float* sum, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Stores 16 bytes in a peer's shared memory and counts them on its barrier.
__device__ __forceinline__ void send_async(uint32_t destination, uint4 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   destination),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
}

template <int N, int COLUMNS, bool BACKWARD>
struct Layout {
  static constexpr int CS = CLUSTER_SIZE;
  static constexpr int U = N / CS;
  static constexpr int ROW_TILES = U / 16;
  static constexpr int WARPS = ROW_TILES * 2;  // two halves of the product's inner dimension
  static constexpr int THREADS = WARPS * 32;
  static constexpr int TILES = COLUMNS / 8;
  static constexpr int PITCH = U + PAD;
  static constexpr int BLOCK = COLUMNS * PITCH;  // one block's slice of a step, in elements
  static constexpr int VECTORS = COLUMNS * U / 8;
  static constexpr int INPUTS = BACKWARD ? 2 : 1;
  static constexpr int OUTPUTS = BACKWARD ? 1 : 2;
  // exchange [2][CS][BLOCK], ring [RING][INPUTS][BLOCK], stage [2][OUTPUTS][BLOCK], halves [WARPS][TILES * 2][32]
  static constexpr size_t SHARED_BYTES =
      sizeof(bf16) * BLOCK * (2 * CS + RING * INPUTS + 2 * OUTPUTS) + sizeof(float) * WARPS * TILES * 2 * 32;
  static_assert(VECTORS <= THREADS, "a thread moves at most one vector of a slice");
  static_assert(VECTORS * CS % THREADS == 0 || VECTORS * CS < THREADS, "sends are split evenly");
};

template <int N, int COLUMNS, bool BACKWARD>
__global__ void __launch_bounds__(Layout<N, COLUMNS, BACKWARD>::THREADS, CLUSTER_SIZE == 8 && COLUMNS <= 16 ? 2 : 1)
    reservoir_sweep(const __grid_constant__ Sweep sweep) {
  using Lay = Layout<N, COLUMNS, BACKWARD>;
  constexpr int CS = Lay::CS, U = Lay::U, THREADS = Lay::THREADS, TILES = Lay::TILES, PITCH = Lay::PITCH;
  constexpr int BLOCK = Lay::BLOCK, VECTORS = Lay::VECTORS, INPUTS = Lay::INPUTS, OUTPUTS = Lay::OUTPUTS;
  constexpr int HALF = N / 2, K_STEPS = HALF / 16;
  constexpr uint32_t BYTES_PER_STEP = COLUMNS * N * sizeof(bf16);

  extern __shared__ __align__(128) unsigned char memory[];
  bf16* exchange = reinterpret_cast<bf16*>(memory);
  bf16* ring = exchange + 2 * CS * BLOCK;
  bf16* stage = ring + RING * INPUTS * BLOCK;
  float* halves = reinterpret_cast<float*>(stage + 2 * OUTPUTS * BLOCK);
  __shared__ int flags[2][COLUMNS];
  __shared__ __align__(8) uint64_t barriers[2];

  auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x % CS, reservoir = (blockIdx.x / CS) % sweep.num_reservoirs;
  const int first_column = blockIdx.x / (CS * sweep.num_reservoirs) * COLUMNS;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, row_tile = warp >> 1, half = warp & 1;
  const int group = lane >> 2, quad = lane & 3;  // as the mma fragments name them
  const int T = sweep.num_positions, steps = sweep.warmup + sweep.length;
  const int64_t row_size = static_cast<int64_t>(sweep.num_reservoirs) * N;
  const float leak_rate = sweep.leak_rate, keep_rate = 1.f - leak_rate;

  // Of its row tile, this thread finishes row `group` (half 0) or `group + 8` (half 1), in columns 8 i + 2 quad + e.
  const int unit_of_block = row_tile * 16 + group + 8 * half, unit = reservoir * N + rank * U + unit_of_block;

  uint32_t weight[K_STEPS][4];
  {
    const bf16* slice = sweep.weight + static_cast<int64_t>(reservoir) * N * N + (rank * U + row_tile * 16) * N +
                        half * HALF + quad * 2;
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) {
      weight[k][0] = *reinterpret_cast<const uint32_t*>(slice + group * N + k * 16);
      weight[k][1] = *reinterpret_cast<const uint32_t*>(slice + (group + 8) * N + k * 16);
      weight[k][2] = *reinterpret_cast<const uint32_t*>(slice + group * N + k * 16 + 8);
      weight[k][3] = *reinterpret_cast<const uint32_t*>(slice + (group + 8) * N + k * 16 + 8);
    }
  }

  // Threads below COLUMNS watch over one column each: is it inside the sequence, does a document start here?
  const int watched = first_column + thread;
  const bool watches = thread < COLUMNS && watched < sweep.num_columns;
  const int watched_sequence = watches ? watched / sweep.num_chunks : 0;
  const int watched_tau = (watched - watched_sequence * sweep.num_chunks) * sweep.length - sweep.warmup;
  auto reset_at = [&](int step) -> int {
    // Backward, what is carried from t + 1 down to t crosses the edge at t + 1.
    const int tau = watched_tau + step, edge = BACKWARD ? T - tau : tau;
    if (!sweep.reset || !watches || edge < 0 || edge >= T) return 0;
    return sweep.reset[static_cast<int64_t>(watched_sequence) * T + edge];
  };
  auto flags_at = [&](int step, int reset) {
    const int tau = watched_tau + step;
    return (watches && tau >= 0 && tau < T ? LIVE : 0) | (reset ? CUT : 0);
  };

  // Threads below VECTORS move 16 bytes of one column in and out.
  const bool moves = thread < VECTORS;
  const int moved_column = moves ? thread / (U / 8) : 0, moved_unit = thread % (U / 8) * 8;
  const bool moves_out = moves && first_column + moved_column < sweep.num_columns;
  const int moved = moves_out ? first_column + moved_column : 0;
  const int moved_sequence = moved / sweep.num_chunks;
  const int moved_tau = (moved - moved_sequence * sweep.num_chunks) * sweep.length - sweep.warmup;
  const int moved_slot = moved_column * PITCH + moved_unit;
  const int64_t moved_offset = reservoir * N + rank * U + moved_unit;
  auto row_of = [&](int tau) {
    return (static_cast<int64_t>(moved_sequence) * T + (BACKWARD ? T - 1 - tau : tau)) * row_size + moved_offset;
  };
  auto prefetch = [&](int step) {
    if (moves && step < steps) {
      // Outside the sequence nothing is used of what is read: any row inside will do.
      const int64_t row = row_of(min(max(moved_tau + step, 0), T - 1));
      const uint32_t slot = shared_address(ring + step % RING * INPUTS * BLOCK + moved_slot);
      copy_async(slot, sweep.input + row);
      if (BACKWARD) copy_async(slot + BLOCK * sizeof(bf16), sweep.gain + row);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  // What is carried: forward x; backward (1 - a) lambda, the part of mu that does not come through W.
  float carried[TILES][2];
#pragma unroll
  for (int i = 0; i < TILES; i++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int n = i * 8 + 2 * quad + e, column = first_column + n;
      const int sequence = column / sweep.num_chunks, chunk = column - sequence * sweep.num_chunks;
      float value = 0.f;
      if (column < sweep.num_columns) {
        if (sweep.starts) {
          value = sweep.starts[column * row_size + unit];
        } else if (sweep.initial && chunk * sweep.length <= sweep.warmup) {
          value = sweep.initial[sequence * row_size + unit];  // held until the window reaches position 0
        }
      }
      carried[i][e] = value;
      stage[n * PITCH + unit_of_block] = __float2bfloat16(BACKWARD ? 0.f : value);
    }
  }

  const uint32_t barrier = shared_address(barriers);
  if (thread == 0) {
    for (int b = 0; b < 2; b++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * b));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int b = 0; b < 2; b++) expect_bytes(barrier + 8 * b, BYTES_PER_STEP);
  }

  // The slice staged in half `buffer` goes to the same half of every block's exchange, this block's included.
  auto send = [&](int buffer) {
#pragma unroll
    for (int k = 0; k < (VECTORS * CS + THREADS - 1) / THREADS; k++) {
      const int i = thread + k * THREADS;
      if (i < VECTORS * CS) {
        const int peer = i / VECTORS, vector = i % VECTORS;
        const int slot = vector / (U / 8) * PITCH + vector % (U / 8) * 8;
        const uint4 value = *reinterpret_cast<const uint4*>(stage + buffer * OUTPUTS * BLOCK + slot);
        const uint32_t destination = shared_address(exchange + (buffer * CS + rank) * BLOCK + slot);
        send_async(peer_address(destination, peer), value, peer_address(barrier + 8 * buffer, peer));
      }
    }
  };

  prefetch(0);
  prefetch(1);
  prefetch(2);
  if (thread < COLUMNS) flags[0][thread] = flags_at(0, reset_at(0));
  int next_reset = reset_at(1);  // read a step ahead
  asm volatile("cp.async.wait_group 2;" ::: "memory");
  cluster.sync();  // every block's barriers are ready, and its stage and flags are written
  send(0);

  auto record = [&](float* where, int n, float value) {
    if (first_column + n < sweep.num_columns) where[(first_column + n) * row_size + unit] = value;
  };
  const uint32_t operand =
      shared_address(exchange + half * HALF / U * BLOCK + (lane & 7) * PITCH + (lane >> 3) * 8);
  // The backward takes one product more: what the last position passes on is W^T times its delta.
  const int products = BACKWARD ? steps + 1 : steps;

#pragma unroll 1
  for (int step = 0; step < products; step++) {
    const int buffer = step & 1;
    float sum[TILES][CHAINS][4] = {};
    wait_for_phase(barrier + 8 * buffer, (step >> 1) & 1);
    // Nobody can send step + 2 before this block has sent step + 1, so this is in time.
    if (thread == 0) expect_bytes(barrier + 8 * buffer, BYTES_PER_STEP);
#pragma unroll
    for (int k = 0; k < K_STEPS; k += 2) {
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        uint32_t tile[4];
        const int offset = buffer * CS * BLOCK + k * 16 / U * BLOCK + k * 16 % U + i * 8 * PITCH;
        load_matrices(tile, operand + offset * sizeof(bf16));
        multiply_add(sum[i][k % CHAINS], weight[k], tile[0], tile[1]);
        multiply_add(sum[i][(k + 1) % CHAINS], weight[k + 1], tile[2], tile[3]);
      }
    }
    // The two warps of a row tile hold half of each sum; each finishes 8 of the 16 rows.
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int c = 1; c < CHAINS; c++) sum[i][0][e] += sum[i][c][e];
      }
#pragma unroll
      for (int e = 0; e < 2; e++)
        halves[((warp * TILES + i) * 2 + e) * 32 + lane] = half ? sum[i][0][e] : sum[i][0][2 + e];
    }
    asm volatile("bar.sync %0, 64;" ::"r"(1 + row_tile) : "memory");

    bf16* staged = stage + (buffer ^ 1) * OUTPUTS * BLOCK;
    const bf16* inputs = ring + step % RING * INPUTS * BLOCK;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int n = i * 8 + 2 * quad + e, slot = n * PITCH + unit_of_block;
        const int flag = flags[buffer][n];
        const float mine = half ? sum[i][0][2 + e] : sum[i][0][e];
        float product = mine + halves[(((warp ^ 1) * TILES + i) * 2 + e) * 32 + lane];
        float received = BACKWARD ? carried[i][e] + product : carried[i][e];
        if (flag & CUT) product = received = 0.f;
        if (step == sweep.warmup) record(sweep.start_output, n, received);
        const float in = __bfloat162float(inputs[slot]);
        if (BACKWARD) {
          const float lambda = in + received;
          const float delta = leak_rate * __bfloat162float(inputs[(INPUTS - 1) * BLOCK + slot]) * lambda;
          carried[i][e] = flag & LIVE ? keep_rate * lambda : received;
          staged[slot] = __float2bfloat16(flag & LIVE ? delta : 0.f);
          if (step == steps) record(sweep.end_output, n, received);
        } else {
          float z = product + in;
          z = z > 15.f ? 15.f : z < -15.f ? -15.f : z;  // and a NaN stays one
          const float exponential = __expf(2.f * z), inverse = __fdividef(1.f, exponential + 1.f);
          if (flag & LIVE) carried[i][e] = keep_rate * received + leak_rate * (1.f - 2.f * inverse);
          staged[slot] = __float2bfloat16(carried[i][e]);
          staged[(OUTPUTS - 1) * BLOCK + slot] = __float2bfloat16(4.f * exponential * inverse * inverse);
          if (step == steps - 1) record(sweep.end_output, n, carried[i][e]);
        }
      }
    }
    if (step == products - 1 && BACKWARD) break;
    if (thread < COLUMNS) flags[buffer ^ 1][thread] = flags_at(step + 1, next_reset);
    asm volatile("cp.async.wait_group 1;" ::: "memory");  // the inputs of step + 1
    __syncthreads();
    if (step + 1 < products) send(buffer ^ 1);
    const int tau = moved_tau + step;
    if (moves_out && step >= sweep.warmup && tau < T) {
      const int64_t row = row_of(tau);
      *reinterpret_cast<uint4*>(sweep.output + row) = *reinterpret_cast<const uint4*>(staged + moved_slot);
      if (!BACKWARD && sweep.gain_output)
        *reinterpret_cast<uint4*>(sweep.gain_output + row) =
            *reinterpret_cast<const uint4*>(staged + (OUTPUTS - 1) * BLOCK + moved_slot);
    }
    prefetch(step + 3);
    next_reset = reset_at(step + 2);
  }
  cluster.sync();  // no block leaves while another may still address its memory
}

template <int N, int COLUMNS, bool BACKWARD>
cudaError_t configure(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, const Sweep& sweep) {
  using Lay = Layout<N, COLUMNS, BACKWARD>;
  const unsigned groups = (sweep.num_columns + COLUMNS - 1) / COLUMNS;
  config = {};
  config.gridDim = dim3(groups * sweep.num_reservoirs * Lay::CS);
  config.blockDim = dim3(Lay::THREADS);
  config.dynamicSmemBytes = Lay::SHARED_BYTES;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Lay::CS;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaFuncSetAttribute(reservoir_sweep<N, COLUMNS, BACKWARD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(Lay::SHARED_BYTES));
}

template <int N, int COLUMNS, bool BACKWARD>
cudaError_t run(const Sweep& sweep, cudaStream_t stream, int* resident_clusters) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attribute;
  cudaError_t error = configure<N, COLUMNS, BACKWARD>(config, attribute, sweep);
  if (error != cudaSuccess) return error;
  if (resident_clusters)
    return cudaOccupancyMaxActiveClusters(resident_clusters, reservoir_sweep<N, COLUMNS, BACKWARD>, &config);
  config.stream = stream;
  error = cudaLaunchKernelEx(&config, reservoir_sweep<N, COLUMNS, BACKWARD>, sweep);
  return error != cudaSuccess ? error : cudaGetLastError();
}

cudaError_t dispatch(bool backward, int num_units, int columns, const Sweep& sweep, cudaStream_t stream, int* resident) {
#define CASE(N, COLUMNS)                                                       \
  if (num_units == N && columns == COLUMNS)                                    \
    return backward ? run<N, COLUMNS, true>(sweep, stream, resident) : run<N, COLUMNS, false>(sweep, stream, resident);
  CASE(512, 8)
  CASE(512, 16)
  CASE(256, 8)
  CASE(256, 16)
#undef CASE
  return cudaErrorInvalidValue;
}

}  // namespace

// Both return a cudaError_t; `reservoir_error` names it.
extern "C" int reservoir_sweep_launch(int device, int backward, int columns, const void* weight, const void* input,
                                      const void* gain, void* output, void* gain_output, const void* initial,
                                      const void* starts, const void* reset, void* start_output, void* end_output,
                                      int batch, int num_positions, int num_reservoirs, int num_units, int length,
                                      int warmup, float leak_rate, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  Sweep sweep;
  sweep.weight = static_cast<const bf16*>(weight);
  sweep.input = static_cast<const bf16*>(input);
  sweep.gain = static_cast<const bf16*>(gain);
  sweep.output = static_cast<bf16*>(output);
  sweep.gain_output = static_cast<bf16*>(gain_output);
  sweep.initial = static_cast<const float*>(initial);
  sweep.starts = static_cast<const float*>(starts);
  sweep.reset = static_cast<const unsigned char*>(reset);
  sweep.start_output = static_cast<float*>(start_output);
  sweep.end_output = static_cast<float*>(end_output);
  sweep.num_positions = num_positions;
  sweep.num_reservoirs = num_reservoirs;
  sweep.length = length;
  sweep.warmup = warmup;
  sweep.num_chunks = (num_positions + length - 1) / length;
  sweep.num_columns = batch * sweep.num_chunks;
  sweep.leak_rate = leak_rate;
  return dispatch(backward != 0, num_units, columns, sweep, static_cast<cudaStream_t>(stream), nullptr);
}

// How many clusters the device holds at once.
extern "C" int reservoir_resident_clusters(int device, int backward, int columns, int num_units, int* found) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  Sweep sweep = {};
  sweep.num_reservoirs = 1;
  sweep.num_columns = columns;
  return dispatch(backward != 0, num_units, columns, sweep, nullptr, found);
}

extern "C" const char* reservoir_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
