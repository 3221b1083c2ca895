// The chunked reservoir recurrence, forward or backward (sm_90a): one launch a sweep, one that judges its boundaries,
// and the same again for every repair and for the exact sweep, which return at once when there is nothing left to do.
// The host waits for none of it.
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

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cluster.cuh"

namespace {

using bf16 = __nv_bfloat16;

constexpr int CLUSTER_SIZE = 4;
constexpr int RING = 4;     // input rows in flight: this step's and the next three
constexpr int CHAINS = 2;   // independent accumulators per output tile
constexpr int PAD = 8;      // after each row in shared memory: ldmatrix then meets no bank conflict
constexpr int LIVE = 1, CUT = 2;
constexpr int JUDGE_THREADS = 256, JUDGE_BLOCKS = 128;

// What later launches of a solve read to know whether they are needed.
struct Progress {
  int agreed;         // the boundaries of the last sweep do
  unsigned finished;  // blocks of the judge that have measured their share
};

// How a solve ended; every pointer is to device memory.
struct Verdict {
  float* residual;         // [R], of the first sweep; 0 with one chunk
  int* repair_passes;      // []
  bool* fell_back;         // []
  float* gain_statistics;  // [2]: share of gains below `saturated_below`, mean gain; may be null
};

// T positions of B sequences, [B, T, R, N] bf16; recorded and given states [B, chunks, R, N] and [B, R, N] fp32.
struct Sweep {
  const bf16* weight;          // [R, N, N]; the backward reads it transposed
  const bf16* input;           // drive, or the gradient of the states
  const bf16* gain;            // backward only
  bf16* output;                // states, or delta
  bf16* gain_output;           // forward only; may be null
  const float* initial;        // before position 0 of the chain; null is zero
  const float* ends;           // of the sweep before, from which chunks start in place of a warm-up; null: warm up
  const unsigned char* reset;  // [B, T]; null is no reset
  float* start_output;         // what each chunk carried into its first own position
  float* end_output;           // what it carried out of its last one
  float* final_output;         // [B, R, N]: the last chunk's end
  double* gain_sums;           // [blocks, 2]: sum of the gains, how many are saturated; forward only; may be null
  Progress* progress;
  Verdict verdict;
  bool first;                  // of its solve: starts the verdict; all others return if the boundaries agree
  int num_positions, num_reservoirs, length, warmup, num_chunks, num_columns;
  float leak_rate, saturated_below;
};

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
__global__ void __launch_bounds__(Layout<N, COLUMNS, BACKWARD>::THREADS, 1)
    reservoir_sweep(const __grid_constant__ Sweep sweep) {
  if (sweep.first) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *sweep.progress = {};
      *sweep.verdict.repair_passes = 0;
      *sweep.verdict.fell_back = false;
      for (int r = 0; r < sweep.num_reservoirs; r++) sweep.verdict.residual[r] = 0.f;
    }
  } else if (sweep.progress->agreed) {
    return;  // all blocks of all clusters read the same, before any of them waits for another
  }
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
    const int row = rank * U + row_tile * 16 + group, column = half * HALF + quad * 2;
    const bf16* matrix = sweep.weight + static_cast<int64_t>(reservoir) * N * N +
                         (BACKWARD ? column * N + row : row * N + column);
    auto pair = [&](int rows, int columns) -> uint32_t {  // two neighbours of a row, this far from row and column
      if (!BACKWARD) return *reinterpret_cast<const uint32_t*>(matrix + rows * N + columns);
      const auto* where = reinterpret_cast<const unsigned short*>(matrix + columns * N + rows);
      return where[0] | static_cast<uint32_t>(where[N]) << 16;
    };
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) {
      weight[k][0] = pair(0, k * 16);
      weight[k][1] = pair(8, k * 16);
      weight[k][2] = pair(0, k * 16 + 8);
      weight[k][3] = pair(8, k * 16 + 8);
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
        if (sweep.ends && chunk > 0) {
          value = sweep.ends[(column - 1) * row_size + unit];
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
  float gain_sum = 0.f;
  int num_saturated = 0;
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
          if (step == steps) carried[i][e] = received;
        } else {
          float z = product + in;
          z = z > 15.f ? 15.f : z < -15.f ? -15.f : z;  // and a NaN stays one
          const float exponential = __expf(2.f * z), inverse = __fdividef(1.f, exponential + 1.f);
          if (flag & LIVE) carried[i][e] = keep_rate * received + leak_rate * (1.f - 2.f * inverse);
          staged[slot] = __float2bfloat16(carried[i][e]);
          staged[(OUTPUTS - 1) * BLOCK + slot] = __float2bfloat16(4.f * exponential * inverse * inverse);
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
      if (!BACKWARD) {
        const uint4 gains = *reinterpret_cast<const uint4*>(staged + (OUTPUTS - 1) * BLOCK + moved_slot);
        if (sweep.gain_output) *reinterpret_cast<uint4*>(sweep.gain_output + row) = gains;
        if (sweep.gain_sums) {
          float sum_of_eight = 0.f;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const uint32_t two = i == 0 ? gains.x : i == 1 ? gains.y : i == 2 ? gains.z : gains.w;
            const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000u);
            sum_of_eight += low + high;
            num_saturated += (low < sweep.saturated_below) + (high < sweep.saturated_below);
          }
          gain_sum += sum_of_eight;
        }
      }
    }
    prefetch(step + 3);
    next_reset = reset_at(step + 2);
  }
#pragma unroll
  for (int i = 0; i < TILES; i++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int n = i * 8 + 2 * quad + e, column = first_column + n;
      record(sweep.end_output, n, carried[i][e]);
      if (column < sweep.num_columns && (column + 1) % sweep.num_chunks == 0)
        sweep.final_output[column / sweep.num_chunks * row_size + unit] = carried[i][e];
    }
  }
  if (!BACKWARD && sweep.gain_sums) {
    double* of_warp = reinterpret_cast<double*>(halves);
    double total = gain_sum, saturated = num_saturated;
    for (int far = 16; far > 0; far /= 2) {
      total += __shfl_xor_sync(~0u, total, far);
      saturated += __shfl_xor_sync(~0u, saturated, far);
    }
    if (lane == 0) of_warp[2 * warp] = total, of_warp[2 * warp + 1] = saturated;
    __syncthreads();
    if (thread < 2) {
      double sum = 0.;
      for (int w = 0; w < Lay::WARPS; w++) sum += of_warp[2 * w + thread];
      sweep.gain_sums[2 * blockIdx.x + thread] = sum;
    }
  }
  cluster.sync();  // no block leaves while another may still address its memory
}

// What one sweep left at its boundaries, and what the solve makes of it.
struct Judgement {
  const float* start;          // [B, chunks, R, N]
  const float* end;
  const unsigned char* reset;  // [B, T]; null is no reset
  const double* gain_sums;     // [num_gain_sums, 2]; null without statistics
  double* norms;               // [R, B * (chunks - 1), 2]: of the mismatch, of what was sent; -1 where it does not count
  Progress* progress;
  Verdict verdict;
  bool backward, exact;        // exact: of the sequential sweep, which is not judged
  int pass, max_repair_passes; // pass 0 is the first sweep
  int batch, num_positions, num_reservoirs, num_units, length, num_chunks, num_gain_sums;
  double tolerance;
};

__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }  // NaN is largest

__global__ void __launch_bounds__(JUDGE_THREADS) reservoir_judge(const __grid_constant__ Judgement judgement) {
  const Judgement& j = judgement;
  if ((j.pass > 0 || j.exact) && j.progress->agreed) return;
  constexpr int WARPS = JUDGE_THREADS / 32;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int num_boundaries = j.exact ? 0 : j.batch * (j.num_chunks - 1);
  const int64_t row_size = static_cast<int64_t>(j.num_reservoirs) * j.num_units;

  // A warp measures one boundary of one reservoir.  Squares of small gradients leave the range of fp32 long before
  // the gradients do, hence doubles.
  for (int64_t i = blockIdx.x * WARPS + warp; i < static_cast<int64_t>(num_boundaries) * j.num_reservoirs;
       i += gridDim.x * WARPS) {
    const int boundary = i / j.num_reservoirs, reservoir = i % j.num_reservoirs;
    const int sequence = boundary / (j.num_chunks - 1), chunk = boundary % (j.num_chunks - 1) + 1;
    const int position = j.backward ? j.num_positions - chunk * j.length : chunk * j.length;  // the later side
    double error = 0., size = 0.;
    if (j.reset && j.reset[static_cast<int64_t>(sequence) * j.num_positions + position]) {
      size = -1.;
    } else {
      const int64_t offset = (static_cast<int64_t>(sequence) * j.num_chunks + chunk) * row_size + reservoir * j.num_units;
      const float4* received = reinterpret_cast<const float4*>(j.start + offset);
      const float4* sent = reinterpret_cast<const float4*>(j.end + offset - row_size);
      auto add = [](double& sum, float value) { sum += static_cast<double>(value) * value; };
#pragma unroll 4
      for (int n = lane; n < j.num_units / 4; n += 32) {
        const float4 r = received[n], s = sent[n];
        add(error, r.x - s.x), add(error, r.y - s.y), add(error, r.z - s.z), add(error, r.w - s.w);
        add(size, s.x), add(size, s.y), add(size, s.z), add(size, s.w);
      }
      for (int far = 16; far > 0; far /= 2) {
        error += __shfl_xor_sync(~0u, error, far);
        size += __shfl_xor_sync(~0u, size, far);
      }
      error = sqrt(error), size = sqrt(size);
    }
    double* norms = j.norms + (static_cast<int64_t>(reservoir) * num_boundaries + boundary) * 2;
    if (lane == 0) norms[0] = error, norms[1] = size;
  }

  // The last block to get here has everybody's norms, and takes them in one order, whichever block it is.
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(&j.progress->finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  __shared__ double residual_of_warp[WARPS];
  double largest = 0.;
  for (int reservoir = warp; reservoir < j.num_reservoirs; reservoir += WARPS) {
    const double2* norms = reinterpret_cast<const double2*>(j.norms) + static_cast<int64_t>(reservoir) * num_boundaries;
    double error = 0., size = 0., count = 0.;
    for (int boundary = lane; boundary < num_boundaries; boundary += 32) {
      const double2 norm = __ldcg(norms + boundary);
      if (norm.y == -1.) continue;
      error = larger(error, norm.x), size += norm.y, count += 1.;
    }
    for (int far = 16; far > 0; far /= 2) {
      error = larger(error, __shfl_xor_sync(~0u, error, far));
      size += __shfl_xor_sync(~0u, size, far);
      count += __shfl_xor_sync(~0u, count, far);
    }
    const double mean = size / fmax(count, 1.);
    const double residual = error / (mean < DBL_MIN ? DBL_MIN : mean);  // and a NaN stays one
    largest = larger(largest, residual);
    if (lane == 0 && j.pass == 0) j.verdict.residual[reservoir] = static_cast<float>(residual);
  }
  if (lane == 0) residual_of_warp[warp] = largest;
  if (j.verdict.gain_statistics && warp == WARPS - 1) {
    double total = 0., saturated = 0.;
    for (int i = lane; i < j.num_gain_sums; i += 32) total += j.gain_sums[2 * i], saturated += j.gain_sums[2 * i + 1];
    for (int far = 16; far > 0; far /= 2) {
      total += __shfl_xor_sync(~0u, total, far);
      saturated += __shfl_xor_sync(~0u, saturated, far);
    }
    const double count = static_cast<double>(j.batch) * j.num_positions * row_size;
    if (lane == 0) {
      j.verdict.gain_statistics[0] = static_cast<float>(saturated / count);
      j.verdict.gain_statistics[1] = static_cast<float>(total / count);
    }
  }
  __syncthreads();
  if (thread != 0 || j.exact) return;
  for (int w = 0; w < WARPS; w++) largest = larger(largest, residual_of_warp[w]);
  const bool agreed = num_boundaries == 0 || largest <= j.tolerance;
  if (j.pass > 0) *j.verdict.repair_passes = j.pass;
  if (!agreed && j.pass == j.max_repair_passes) *j.verdict.fell_back = true;
  j.progress->finished = 0;
  j.progress->agreed = agreed;
}

template <int N, int COLUMNS, bool BACKWARD>
cudaError_t run(const Sweep& sweep, cudaStream_t stream, int* resident_clusters) {
  using Lay = Layout<N, COLUMNS, BACKWARD>;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute;
  config.gridDim = dim3((sweep.num_columns + COLUMNS - 1) / COLUMNS * sweep.num_reservoirs * Lay::CS);
  config.blockDim = dim3(Lay::THREADS);
  config.dynamicSmemBytes = Lay::SHARED_BYTES;
  config.stream = stream;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Lay::CS;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = reservoir_sweep<N, COLUMNS, BACKWARD>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(Lay::SHARED_BYTES));
  if (error != cudaSuccess) return error;
  if (resident_clusters) return cudaOccupancyMaxActiveClusters(resident_clusters, kernel, &config);
  error = cudaLaunchKernelEx(&config, kernel, sweep);
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

int num_blocks(int num_columns, int columns, int num_reservoirs) {
  return (num_columns + columns - 1) / columns * num_reservoirs * CLUSTER_SIZE;
}

// The parts of a solve's scratch memory, from `base` (null to count bytes): a multiple of 16 each.
struct Scratch {
  float *start, *ends[2];
  double *norms, *gain_sums;
  Progress* progress;
  size_t bytes = 0;

  Scratch(void* base, int batch, int num_chunks, int num_reservoirs, int num_units) {
    auto take = [&](size_t size) {
      void* part = static_cast<char*>(base) + bytes;
      bytes += (size + 15) / 16 * 16;
      return part;
    };
    const size_t columns = static_cast<size_t>(batch) * num_chunks, states = columns * num_reservoirs * num_units;
    start = static_cast<float*>(take(states * sizeof(float)));
    for (float*& end : ends) end = static_cast<float*>(take(states * sizeof(float)));
    norms = static_cast<double*>(take(columns * num_reservoirs * 2 * sizeof(double)));
    gain_sums = static_cast<double*>(take(num_blocks(columns, 8, num_reservoirs) * 2 * sizeof(double)));
    progress = static_cast<Progress*>(take(sizeof(Progress)));
  }
};

}  // namespace

extern "C" size_t reservoir_scratch_bytes(int batch, int num_positions, int num_reservoirs, int num_units, int length) {
  return Scratch(nullptr, batch, (num_positions + length - 1) / length, num_reservoirs, num_units).bytes;
}

// Enqueues a whole solve: the sweep, its repairs and the exact sweep.  Clusters of the chunked sweeps advance `columns`
// chunks, of the exact one `exact_columns`.  With an infinite tolerance there is nothing after the first judgement.
// This and the next return a cudaError_t; `reservoir_error` names it.
extern "C" int reservoir_solve(int device, int backward, int columns, int exact_columns, const void* weight,
                               const void* input, const void* gain, const void* initial, const void* reset,
                               void* output, void* gain_output, void* final_output, void* residual,
                               void* repair_passes, void* fell_back, void* gain_statistics, void* scratch_memory,
                               int batch, int num_positions, int num_reservoirs, int num_units, int length, int warmup,
                               int max_repair_passes, float leak_rate, float saturated_below, double tolerance,
                               void* stream_handle) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int num_chunks = (num_positions + length - 1) / length;
  const Scratch scratch(scratch_memory, batch, num_chunks, num_reservoirs, num_units);

  Sweep sweep = {};
  sweep.weight = static_cast<const bf16*>(weight);
  sweep.input = static_cast<const bf16*>(input);
  sweep.gain = static_cast<const bf16*>(gain);
  sweep.output = static_cast<bf16*>(output);
  sweep.gain_output = static_cast<bf16*>(gain_output);
  sweep.initial = static_cast<const float*>(initial);
  sweep.reset = static_cast<const unsigned char*>(reset);
  sweep.start_output = scratch.start;
  sweep.final_output = static_cast<float*>(final_output);
  sweep.gain_sums = gain_statistics ? scratch.gain_sums : nullptr;
  sweep.progress = scratch.progress;
  sweep.verdict = {static_cast<float*>(residual), static_cast<int*>(repair_passes), static_cast<bool*>(fell_back),
                   static_cast<float*>(gain_statistics)};
  sweep.first = true;
  sweep.num_positions = num_positions;
  sweep.num_reservoirs = num_reservoirs;
  sweep.length = length;
  sweep.warmup = warmup;
  sweep.num_chunks = num_chunks;
  sweep.num_columns = batch * num_chunks;
  sweep.leak_rate = leak_rate;
  sweep.saturated_below = saturated_below;

  Judgement judgement = {};
  judgement.start = scratch.start;
  judgement.reset = sweep.reset;
  judgement.gain_sums = sweep.gain_sums;
  judgement.norms = scratch.norms;
  judgement.progress = scratch.progress;
  judgement.verdict = sweep.verdict;
  judgement.backward = backward != 0;
  judgement.max_repair_passes = max_repair_passes;
  judgement.batch = batch;
  judgement.num_positions = num_positions;
  judgement.num_reservoirs = num_reservoirs;
  judgement.num_units = num_units;
  judgement.length = length;
  judgement.num_chunks = num_chunks;
  judgement.tolerance = tolerance;

  auto sweep_and_judge = [&](int columns) {
    judgement.end = sweep.end_output;
    judgement.num_gain_sums = num_blocks(sweep.num_columns, columns, num_reservoirs);
    const cudaError_t error = dispatch(backward != 0, num_units, columns, sweep, stream, nullptr);
    const bool has_boundaries = num_chunks > 1 && !judgement.exact;
    if (error != cudaSuccess || !(has_boundaries || gain_statistics)) return error;
    const int64_t measured = has_boundaries ? static_cast<int64_t>(batch) * (num_chunks - 1) * num_reservoirs : 1;
    const int64_t blocks = (measured * 32 + JUDGE_THREADS - 1) / JUDGE_THREADS;
    reservoir_judge<<<static_cast<int>(blocks < JUDGE_BLOCKS ? blocks : JUDGE_BLOCKS), JUDGE_THREADS, 0, stream>>>(
        judgement);
    return cudaGetLastError();
  };

  sweep.end_output = scratch.ends[0];
  error = sweep_and_judge(columns);
  if (error != cudaSuccess || num_chunks == 1 || isinf(tolerance)) return error;
  sweep.first = false;
  sweep.warmup = 0;
  for (int pass = 1; pass <= max_repair_passes; pass++) {
    judgement.pass = pass;
    sweep.ends = scratch.ends[(pass - 1) % 2];
    sweep.end_output = scratch.ends[pass % 2];
    error = sweep_and_judge(columns);
    if (error != cudaSuccess) return error;
  }
  judgement.exact = true;
  sweep.ends = nullptr;
  sweep.length = num_positions;
  sweep.num_chunks = 1;
  sweep.num_columns = batch;
  return sweep_and_judge(exact_columns);
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
