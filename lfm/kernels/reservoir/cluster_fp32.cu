// One sweep of the chunked reservoir recurrence in fp32, forward or backward, in one launch (sm_90a).
//
// A cluster of CS thread blocks advances COLUMNS chunks of one reservoir through warmup + length steps.  Block k owns
// U = N/CS units and keeps its U x N slice of W in registers, 64 a thread; the products are fp32 FMAs.  A warp owns
// 2048/N units whole: its lanes add up their parts by shuffles, finish the step, and send the new values to all blocks
// of the cluster, into one of two buffers.  mbarriers count the bytes that land; nothing else synchronises a step.
// Clusters never wait for each other, so a grid may have more of them than the device holds at once.
//
// Chunks are counted along the chain (chunk 0 starts from the given state), and so is time: position tau of the chain
// is t = tau forward and t = T - 1 - tau backward.  README.md has the equations and the picture.
//
// What is summed, and in which order, depends neither on COLUMNS nor on the column a chunk sits in: results are the
// same bits in every batch.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cluster.cuh"

namespace {

constexpr int K_LANES = 16;                // lanes of a warp among which the inner dimension is dealt out
constexpr int ROW_GROUPS = 32 / K_LANES;   // neighbouring lanes hold different rows and read the same x
constexpr int WIDTH = 4;                   // values of one column sent at a time

// T positions of B sequences, [B, T, R, N]; recorded and given states [B, chunks, R, N] and [B, R, N].
struct Sweep {
  const float* weight;         // [R, N, N]; the backward reads it transposed
  const float* input;          // drive, or the gradient of the states
  const float* gain;           // backward only
  float* output;               // states, or delta
  float* gain_output;          // forward only; may be null
  const float* initial;        // before position 0 of the chain; null is zero
  const float* starts;         // of every chunk, in place of a warm-up; null outside repairs
  const unsigned char* reset;  // [B, T]; null is no reset
  float* start_output;         // what each chunk carried into its first own position
  float* end_output;           // what it carried out of its last one
  int num_positions, num_reservoirs, length, warmup, num_chunks, num_columns;
  float leak_rate;
};

// Stores 16 bytes in a peer's shared memory and counts them on its barrier.
__device__ __forceinline__ void send_async(uint32_t destination, const float (&value)[4], uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   destination),
               "r"(__float_as_uint(value[0])), "r"(__float_as_uint(value[1])), "r"(__float_as_uint(value[2])),
               "r"(__float_as_uint(value[3])), "r"(barrier)
               : "memory");
}

// The same within a cluster of one block, whose barrier counts the packets: there is no peer to store asynchronously to.
__device__ __forceinline__ void send_here(uint32_t destination, const float (&value)[4], uint32_t barrier) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(destination), "r"(__float_as_uint(value[0])),
               "r"(__float_as_uint(value[1])), "r"(__float_as_uint(value[2])), "r"(__float_as_uint(value[3]))
               : "memory");
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Adds up each of SUMS over the lanes that share a row group.  Of two lanes each keeps half of the sums while there are
// several; the tree of additions is the same for any number of sums.
template <int SUMS, int BIT>
__device__ __forceinline__ void add_up(float* sum, int lane) {
  if constexpr (BIT >= ROW_GROUPS) {
    if constexpr (SUMS > 1) {
      const bool upper = lane & BIT;
#pragma unroll
      for (int s = 0; s < SUMS / 2; s++) {
        const float given = upper ? sum[s] : sum[s + SUMS / 2], kept = upper ? sum[s + SUMS / 2] : sum[s];
        sum[s] = kept + __shfl_xor_sync(~0u, given, BIT);
      }
    } else {
      sum[0] += __shfl_xor_sync(~0u, sum[0], BIT);
    }
    add_up<(SUMS > 1 ? SUMS / 2 : 1), BIT / 2>(sum, lane);
  }
}

template <int N, int COLUMNS>
struct Layout {
  static constexpr int CS = N == 512 ? 8 : N == 256 ? 2 : 1;
  static constexpr int U = N / CS;
  static constexpr int WARP_ROWS = 2048 / N;
  static constexpr int THREADS = U / WARP_ROWS * 32;
  static constexpr int ROWS = WARP_ROWS / ROW_GROUPS;  // of a thread
  static constexpr int STRIDE = 4 * K_LANES;           // of a thread's vectors along the inner dimension
  static constexpr int VECTORS = N / STRIDE, OWN_VECTORS = U / STRIDE;
  static constexpr int SUMS = ROWS * COLUMNS;
  // After the sum over lanes a thread holds FINISHED of its row group's SUMS, as do REPLICAS - 1 others.
  static constexpr int FINISHED = SUMS > K_LANES ? SUMS / K_LANES : 1;
  static constexpr int REPLICAS = SUMS < K_LANES ? K_LANES / SUMS : 1;
  static constexpr int PACKETS = WARP_ROWS / WIDTH * COLUMNS;
  static_assert(ROWS * VECTORS * 4 == 64 && U % STRIDE == 0 && FINISHED <= ROWS && WARP_ROWS % WIDTH == 0);
};

template <int N, int COLUMNS, bool BACKWARD>
__global__ void __launch_bounds__(Layout<N, COLUMNS>::THREADS, 512 / Layout<N, COLUMNS>::THREADS)
    reservoir_sweep_fp32(const __grid_constant__ Sweep sweep) {
  using Lay = Layout<N, COLUMNS>;
  constexpr int CS = Lay::CS, U = Lay::U, WARP_ROWS = Lay::WARP_ROWS, ROWS = Lay::ROWS, STRIDE = Lay::STRIDE;
  constexpr int VECTORS = Lay::VECTORS, FINISHED = Lay::FINISHED, REPLICAS = Lay::REPLICAS, PACKETS = Lay::PACKETS;
  constexpr uint32_t OWN_BYTES = COLUMNS * U * sizeof(float), OTHER_BYTES = COLUMNS * (N - U) * sizeof(float);

  // [COLUMNS][CS][U] of what is multiplied, slices in the order of the ranks from this block's own on.
  __shared__ __align__(128) float exchange[2][COLUMNS * N];
  __shared__ __align__(8) uint64_t barriers[2][2];  // of a buffer: this block's own slice, the others'

  auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x % CS, reservoir = (blockIdx.x / CS) % sweep.num_reservoirs;
  const int first_column = blockIdx.x / (CS * sweep.num_reservoirs) * COLUMNS;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int row_group = lane % ROW_GROUPS, k_lane = lane / ROW_GROUPS;
  const int T = sweep.num_positions, steps = sweep.warmup + sweep.length;
  const int64_t row_size = static_cast<int64_t>(sweep.num_reservoirs) * N;
  const float leak_rate = sweep.leak_rate, keep_rate = 1.f - leak_rate;

  float weight[ROWS][VECTORS][4];
  {
    const float* matrix = sweep.weight + static_cast<int64_t>(reservoir) * N * N;
    const int first_row = rank * U + warp * WARP_ROWS + row_group * ROWS;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = first_row + i, k = (rank * U + v * STRIDE + k_lane * 4 + e) % N;
          weight[i][v][e] = matrix[BACKWARD ? k * N + row : row * N + k];
        }
      }
    }
  }

  // This thread finishes units `unit + o`, o < FINISHED, of one column.
  const int first_sum = k_lane / REPLICAS * FINISHED, replica = k_lane % REPLICAS;
  const int unit = reservoir * N + rank * U + warp * WARP_ROWS + row_group * ROWS + first_sum % ROWS;
  const int column = first_column + first_sum / ROWS;
  const bool exists = column < sweep.num_columns, records = exists && replica == 0;
  const int sequence = exists ? column / sweep.num_chunks : 0;
  const int chunk = exists ? column - sequence * sweep.num_chunks : 0;
  const int first_tau = chunk * sweep.length - sweep.warmup;
  auto row_of = [&](int tau) {
    return (static_cast<int64_t>(sequence) * T + (BACKWARD ? T - 1 - tau : tau)) * row_size + unit;
  };
  auto reset_at = [&](int step) -> uint32_t {
    // Backward, what is carried from t + 1 down to t crosses the edge at t + 1.
    const int tau = first_tau + step, edge = BACKWARD ? T - tau : tau;
    if (!sweep.reset || !exists || edge < 0 || edge >= T) return 0;
    return sweep.reset[static_cast<int64_t>(sequence) * T + edge];
  };

  // What is carried: forward x; backward (1 - a) lambda, the part of mu that does not come through W.
  float carried[FINISHED], input[FINISHED], gain[FINISHED], sent[FINISHED];
  float next_input[FINISHED], next_gain[FINISHED];
  uint32_t next_reset;  // as it is in memory: whoever looks at it waits for it
  auto fetch = [&](int step) {
    // Outside the sequence nothing is used of what is read: any row inside will do.
    const int64_t row = row_of(min(max(first_tau + step, 0), T - 1));
#pragma unroll
    for (int o = 0; o < FINISHED; o++) {
      next_input[o] = __ldg(sweep.input + row + o);
      next_gain[o] = BACKWARD ? __ldg(sweep.gain + row + o) : 0.f;
    }
    next_reset = reset_at(step);
  };
  fetch(0);
#pragma unroll
  for (int o = 0; o < FINISHED; o++) {
    carried[o] = 0.f;
    if (exists) {
      if (sweep.starts) {
        carried[o] = sweep.starts[column * row_size + unit + o];
      } else if (sweep.initial && chunk * sweep.length <= sweep.warmup) {
        carried[o] = sweep.initial[sequence * row_size + unit + o];  // held until the window reaches position 0
      }
    }
    sent[o] = BACKWARD ? 0.f : carried[o];
  }

  const uint32_t barrier = shared_address(barriers);
  auto expect_step = [&](int buffer) {
    if (CS == 1) return;
    expect_bytes(barrier + 16 * buffer, OWN_BYTES);
    expect_bytes(barrier + 16 * buffer + 8, OTHER_BYTES);
  };
  if (thread == 0) {
    constexpr uint32_t ARRIVALS = CS == 1 ? OWN_BYTES / (WIDTH * sizeof(float)) : 1;
    for (int b = 0; b < 4; b++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier + 8 * b), "r"(ARRIVALS));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int b = 0; b < 2; b++) expect_step(b);
  }

  // The warp's new values go, a packet a lane and round, to the same buffer of every block, this one included.
  constexpr int ROUNDS = (PACKETS * CS + 31) / 32;
  uint32_t slot[ROUNDS], slot_barrier[ROUNDS];  // of buffer 0
  int holder[ROUNDS][WIDTH];                    // the lane that finishes each value of the packet
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int packet = (round * 32 + lane) / CS % PACKETS, peer = (round * 32 + lane) % CS;
    const int row = packet % (WARP_ROWS / WIDTH) * WIDTH, n = packet / (WARP_ROWS / WIDTH);
    const int slice = (rank - peer + CS) % CS;
    slot[round] = shared_address(&exchange[0][n * N + slice * U + warp * WARP_ROWS + row]);
    slot_barrier[round] = barrier + 8 * (slice != 0);
    if (CS > 1) {
      slot[round] = peer_address(slot[round], peer);
      slot_barrier[round] = peer_address(slot_barrier[round], peer);
    }
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
      holder[round][e] = (n * ROWS + (row + e) % ROWS) / FINISHED * REPLICAS * ROW_GROUPS + (row + e) / ROWS;
  }
  auto send = [&](int buffer) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      float packet[WIDTH];
#pragma unroll
      for (int e = 0; e < WIDTH; e++) packet[e] = __shfl_sync(~0u, sent[e % FINISHED], holder[round][e]);
      if (round * 32 + lane >= PACKETS * CS) continue;
      const uint32_t to = slot[round] + buffer * static_cast<uint32_t>(sizeof(exchange[0]));
      const uint32_t counted_by = slot_barrier[round] + 16 * buffer;
      if constexpr (CS == 1) send_here(to, packet, counted_by);
      else send_async(to, packet, counted_by);
    }
  };

  cluster.sync();  // every block's barriers are ready
  send(0);

  // The backward takes one product more: what the last position passes on is W^T times its delta.
  const int products = BACKWARD ? steps + 1 : steps;

#pragma unroll 1
  for (int step = 0; step < products; step++) {
    const int buffer = step & 1;
    const uint32_t parity = (step >> 1) & 1;
    const uint32_t reset = next_reset;
#pragma unroll
    for (int o = 0; o < FINISHED; o++) input[o] = next_input[o], gain[o] = next_gain[o];
    fetch(step + 1);

    float sum[Lay::SUMS] = {};
    const float* operand = exchange[buffer] + k_lane * 4;
    auto multiply = [&](int v) {
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        const float4 x = *reinterpret_cast<const float4*>(operand + n * N + v * STRIDE);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          float& s = sum[n * ROWS + i];
          s = fmaf(weight[i][v][0], x.x, s);
          s = fmaf(weight[i][v][1], x.y, s);
          s = fmaf(weight[i][v][2], x.z, s);
          s = fmaf(weight[i][v][3], x.w, s);
        }
      }
    };
    wait_for_phase(barrier + 16 * buffer, parity);
#pragma unroll
    for (int v = 0; v < Lay::OWN_VECTORS; v++) multiply(v);
    if (CS > 1) wait_for_phase(barrier + 16 * buffer + 8, parity);
    // Nobody can send step + 2 before this warp has sent step + 1, so this is in time.
    if (thread == 0) expect_step(buffer);
#pragma unroll
    for (int v = Lay::OWN_VECTORS; v < VECTORS; v++) multiply(v);

    add_up<Lay::SUMS, 16>(sum, lane);

    const int tau = first_tau + step;
    const bool live = exists && tau >= 0 && tau < T;
    float received[FINISHED], squashed[FINISHED];
#pragma unroll
    for (int o = 0; o < FINISHED; o++) {
      const float product = reset ? 0.f : sum[o];
      received[o] = reset ? 0.f : carried[o];
      if (BACKWARD) {
        received[o] += product;
        const float lambda = input[o] + received[o];
        sent[o] = live ? leak_rate * gain[o] * lambda : 0.f;
        carried[o] = live ? keep_rate * lambda : received[o];
      } else {
        squashed[o] = tanhf(product + input[o]);
        if (live) carried[o] = keep_rate * received[o] + leak_rate * squashed[o];
        sent[o] = carried[o];
      }
    }
    if (step + 1 < products) send(buffer ^ 1);

    if (!records) continue;
    if (live && step >= sweep.warmup && step < steps) {
      const int64_t row = row_of(tau);
#pragma unroll
      for (int o = 0; o < FINISHED; o++) {
        sweep.output[row + o] = sent[o];
        if (!BACKWARD && sweep.gain_output) sweep.gain_output[row + o] = fmaf(-squashed[o], squashed[o], 1.f);
      }
    }
#pragma unroll
    for (int o = 0; o < FINISHED; o++) {
      if (step == sweep.warmup) sweep.start_output[column * row_size + unit + o] = received[o];
      if (step == products - 1) sweep.end_output[column * row_size + unit + o] = BACKWARD ? received[o] : carried[o];
    }
  }
  cluster.sync();  // no block leaves while another may still address its memory
}

template <int N, int COLUMNS, bool BACKWARD>
cudaError_t run(const Sweep& sweep, cudaStream_t stream, int* resident_clusters) {
  using Lay = Layout<N, COLUMNS>;
  const unsigned groups = (sweep.num_columns + COLUMNS - 1) / COLUMNS;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute;
  config.gridDim = dim3(groups * sweep.num_reservoirs * Lay::CS);
  config.blockDim = dim3(Lay::THREADS);
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Lay::CS;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = reservoir_sweep_fp32<N, COLUMNS, BACKWARD>;
  if (resident_clusters) return cudaOccupancyMaxActiveClusters(resident_clusters, kernel, &config);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, sweep);
  return error != cudaSuccess ? error : cudaGetLastError();
}

cudaError_t dispatch(bool backward, int num_units, int columns, const Sweep& sweep, cudaStream_t stream, int* resident) {
#define CASE(N, COLUMNS)                      \
  if (num_units == N && columns == COLUMNS)   \
    return backward ? run<N, COLUMNS, true>(sweep, stream, resident) : run<N, COLUMNS, false>(sweep, stream, resident);
#define CASES(N) CASE(N, 1) CASE(N, 2) CASE(N, 4)
  CASES(128)
  CASES(256)
  CASES(512)
  CASE(256, 8)
  CASE(512, 8)
#undef CASES
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
  sweep.weight = static_cast<const float*>(weight);
  sweep.input = static_cast<const float*>(input);
  sweep.gain = static_cast<const float*>(gain);
  sweep.output = static_cast<float*>(output);
  sweep.gain_output = static_cast<float*>(gain_output);
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
