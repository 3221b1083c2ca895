// The diagonal gated scan in bf16, forward and backward, each one pass over memory (sm_90a).
//
// A column is 64 channels of one sequence.  A block takes it through time in tiles of WARPS x ROWS positions: warp w
// has the ROWS positions of segment w, a lane two channels.  It folds its segment to one map, learns the state before
// the segment from the folds of the segments before, and goes through its rows again, in registers.  Time runs down in
// the backward: there, "before" and "after" are meant along the scan, whose position u is t = T - 1 - u.
//
// Short sequences are walked: a block has whole columns and keeps the state between tiles.  Long ones are chained:
// tiles are handed out one by one, each publishes its fold, and the state before a tile is put together from those of
// the tiles before it.  In both forms a block loads its next tiles while it computes this one.
//
// A map y -> y + (total - loss y) stands for positions in a row: for one position loss is 1 - alpha, so that decays
// near 1 keep their digits.  README.md has the equations.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace {

using bf16 = __nv_bfloat16;

constexpr int LANES = 32;
constexpr int CHANNELS = 2 * LANES;    // of a column
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * LANES;
constexpr int VECTOR = 8;              // bf16 that a thread copies at once, 16 bytes
constexpr int VECTORS = CHANNELS / VECTOR;
constexpr int GROUP = 8;               // tiles of a chain whose folds are combined one by one; the last of a group
                                       // publishes the state after it
constexpr int QUEUE = 4;               // tiles that a block knows of: the last one, this one, those being loaded
constexpr int FOLD_IS_OUT = 1, STATE_IS_OUT = 2;  // what a tile's flag says: its fold, the state after its group

template <bool BACKWARD>
struct Tiling {
  static constexpr int ROWS = BACKWARD ? 8 : 16;
  static constexpr int TILE = WARPS * ROWS;
  static constexpr int STAGES = 2;
  static constexpr int BLOCKS = BACKWARD ? 3 : 2;  // on a multiprocessor
  static constexpr int INPUTS = BACKWARD ? 4 : 2;
  static_assert(STAGES < QUEUE, "a tile in the queue is not overwritten while it is read");
};

// [B, T, D] bf16, h contiguous, outputs with one stride of their rows, others with strides in elements; [B, D] and [D]
// fp32, contiguous.
struct Scan {
  const bf16 *gate, *value;
  const bf16 *h, *grad_h;                        // backward only
  const float *bias, *state, *grad_final;        // state may be null
  const unsigned char* reset;                    // [B, T]; may be null
  bf16 *output, *grad_value;                     // h forward, the gradient of gate backward
  float* final;                                  // the final state, or the gradient of the first
  float* bias_parts;                             // [B, D] of a walk, [B, tiles, D] of a chain
  float4* folds;                                 // [columns, tiles, LANES]
  float2* group_ends;                            // [columns, tiles, LANES]: only the first of each group is used
  int *flags, *tickets;                          // [columns, tiles] and one, zeroed
  int64_t gate_batch, value_batch, grad_batch;
  int gate_row, value_row, grad_row, output_row;
  int num_positions, num_channels, num_columns, num_tiles;
  float largest_alpha, smallest_gain;
};

template <bool BACKWARD>
struct Stage {
  // gate, value, grad_h and the h before, positions in the order of the scan
  uint32_t rows[Tiling<BACKWARD>::INPUTS][Tiling<BACKWARD>::TILE][LANES];
  float bias[CHANNELS], state[CHANNELS], grad_final[CHANNELS];
};

template <bool BACKWARD>
struct Shared {
  Stage<BACKWARD> stages[Tiling<BACKWARD>::STAGES];
  float4 folds[WARPS][LANES];
  union {
    float4 earlier_folds[GROUP - 1][LANES];  // of the tiles before this one in its group
    float2 bias_sums[WARPS][LANES];          // of this tile, until the next one begins
  };
  float2 carry[2][LANES];  // before this tile and before the next
  int4 queue[QUEUE];
};

// PTX without a C++ name, or whose C++ name costs more.

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float min_or_nan(float x, float bound) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
}

__device__ __forceinline__ uint32_t max_or_nan(uint32_t pair, uint32_t bound) {
  uint32_t y;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(pair), "r"(bound));
  return y;
}

__device__ __forceinline__ uint32_t round_pair(float2 pair) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(pair.y), "f"(pair.x));
  return y;
}

// 16 bytes, zero where there are none.
__device__ __forceinline__ void copy_async(void* destination, const void* source, bool present) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(destination));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(present ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ int load_acquire(const int* flag) {
  int word;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(flag) : "memory");
  return word;
}

__device__ __forceinline__ void store_release(int* flag, int word) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(word) : "memory");
}

__device__ __forceinline__ void wait_for(const int* flag, int word) {
  while (load_acquire(flag) < word) {
  }
}

__device__ __forceinline__ float2 widen(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ void store(bf16* at, uint32_t pair) { *reinterpret_cast<uint32_t*>(at) = pair; }

struct Gates {
  float rise, fall, v;  // sigmoid(y), sigmoid(-y) and tanh(u), where y is x plus the bias
};

// One reciprocal serves both.  Bounds at y = -60 and, by the caller, u = -13 keep its divisor finite; beyond them
// sigmoid(y) is 0 and tanh(u) is -1 to fp32's precision.  `offset` is the bias times -log2(e).
__device__ __forceinline__ Gates gates(float x, float offset, float u) {
  const float e = exp2_fast(min_or_nan(fmaf(x, -1.4426950408889634f, offset), 86.5f));
  const float half_q = 0.5f * exp2_fast(u * -2.8853900817779268f) + 0.5f;
  const float above = 1.0f + e;
  const float twice = reciprocal(above * half_q);  // 2 / ((1 + e) (1 + q))
  const float rise = twice * half_q;
  return {rise, e * rise, fmaf(twice, above, -1.0f)};
}

constexpr uint32_t LEAST_VALUES = 0xc150c150u;  // -13, twice

// The maps of two channels.
struct Fold {
  float2 loss, total;

  __device__ static Fold of(float4 words) { return {{words.x, words.y}, {words.z, words.w}}; }
  __device__ float4 words() const { return make_float4(loss.x, loss.y, total.x, total.y); }
};

// The loss of a segment with a reset: nothing crosses it, NaN included.
constexpr float FORGETS = 2.0f;

__device__ __forceinline__ float apply(float loss, float total, float y) {
  return loss == FORGETS ? total : y + fmaf(-loss, y, total);
}

__device__ __forceinline__ float2 apply(const Fold& fold, float2 y) {
  return {apply(fold.loss.x, fold.total.x, y.x), apply(fold.loss.y, fold.total.y, y.y)};
}

__device__ __forceinline__ float loss_of_both(float first, float second) {
  return first == FORGETS || second == FORGETS ? FORGETS : fmaf(second, 1.0f - first, first);
}

__device__ __forceinline__ Fold then(const Fold& first, const Fold& second) {
  return {{loss_of_both(first.loss.x, second.loss.x), loss_of_both(first.loss.y, second.loss.y)},
          apply(second, first.total)};
}

template <bool BACKWARD, bool CHAINED>
__global__ void __launch_bounds__(THREADS, Tiling<BACKWARD>::BLOCKS) diagonal_scan(const Scan scan) {
  using Tile = Tiling<BACKWARD>;
  constexpr int ROWS = Tile::ROWS, TILE = Tile::TILE, STAGES = Tile::STAGES;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared<BACKWARD>& shared = *reinterpret_cast<Shared<BACKWARD>*>(memory);

  const int thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
  const int T = scan.num_positions, D = scan.num_channels;
  const int num_blocks = (D + CHANNELS - 1) / CHANNELS;

  // Thread 0 draws this block's tiles; an item is (sequence, first channel, tile, column), with column -1 at the end.
  int num_drawn = 0;
  auto draw = [&]() -> int { return CHAINED ? atomicAdd(scan.tickets, 1) : num_drawn++; };
  auto item_of = [&](int ticket) -> int4 {
    // A chain's tiles are handed out in order, so what a tile waits for is in the hands of a block that has begun it
    // or will begin it next.
    int tile, column;
    if (CHAINED) {
      tile = ticket / scan.num_columns;
      column = tile < scan.num_tiles ? ticket % scan.num_columns : -1;
    } else {
      tile = ticket % scan.num_tiles;
      column = blockIdx.x + ticket / scan.num_tiles * gridDim.x;
      if (column >= scan.num_columns) column = -1;
    }
    return make_int4(column / num_blocks, column % num_blocks * CHANNELS, tile, column);
  };

  auto load = [&](int k) {
    const int4 item = shared.queue[k % QUEUE];
    if (item.w >= 0) {
      Stage<BACKWARD>& stage = shared.stages[k % STAGES];
      const int64_t sequence = item.x;
      const int channel = item.y + thread % VECTORS * VECTOR;
      const bf16* gate = scan.gate + sequence * scan.gate_batch + channel;
      const bf16* value = scan.value + sequence * scan.value_batch + channel;
      const bf16 *grad_h = nullptr, *h = nullptr;
      if (BACKWARD) {
        grad_h = scan.grad_h + sequence * scan.grad_batch + channel;
        h = scan.h + (sequence * T - 1) * D + channel;
      }
#pragma unroll
      for (int pass = 0; pass < TILE * VECTORS / THREADS; pass++) {
        const int row = thread / VECTORS + pass * (THREADS / VECTORS);
        const int u = item.z * TILE + row;
        const int64_t t = BACKWARD ? T - 1 - u : u;
        const bool present = channel < D && u < T;
        uint32_t* destination = &stage.rows[0][row][thread % VECTORS * (VECTOR / 2)];
        constexpr int INPUT = TILE * LANES;
        copy_async(destination, gate + t * scan.gate_row, present);
        copy_async(destination + INPUT, value + t * scan.value_row, present);
        if (BACKWARD) {
          copy_async(destination + 2 * INPUT, grad_h + t * scan.grad_row, present);
          copy_async(destination + 3 * INPUT, h + t * D, present && t > 0);
        }
      }
      // 16 threads copy 64 floats.
      const int first = item.y + thread % 16 * 4, word = thread % 16 * 4;
      const bool inside = first < D;
      const int64_t of_sequence = sequence * D + first;
      if (thread < 16) {
        copy_async(&stage.bias[word], scan.bias + first, inside);
      } else if (thread < 32) {
        copy_async(&stage.state[word], scan.state ? scan.state + of_sequence : scan.bias, inside && scan.state);
      } else if (BACKWARD && thread < 48) {
        copy_async(&stage.grad_final[word], scan.grad_final + of_sequence, inside);
      }
    }
    end_copies();
  };

  // Whether a document starts at row `lane` of this warp's segment.
  auto reset_at = [&](int4 item) -> int {
    const int u = item.z * TILE + warp * ROWS + lane;
    if (!scan.reset || item.w < 0 || lane >= ROWS || u >= T) return 0;
    return scan.reset[static_cast<int64_t>(item.x) * T + (BACKWARD ? T - 1 - u : u)];
  };

  for (int k = 0; k < STAGES - 1; k++) {
    if (thread == 0) shared.queue[k] = item_of(draw());
    __syncthreads();
    load(k);
  }
  if (thread == 0) shared.queue[STAGES - 1] = item_of(draw());  // seen after the loop's first barrier
  int reset = reset_at(shared.queue[0]);
  float2 bias_sum = {0.0f, 0.0f};

  for (int k = 0;; k++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // the tile is there, and nobody reads the stage any more that is filled next
    if (BACKWARD && k > 0 && warp == 0) {
      const int4 last = shared.queue[(k - 1) % QUEUE];
      if (CHAINED || last.z == scan.num_tiles - 1) {
        float2 sum = shared.bias_sums[0][lane];
        for (int w = 1; w < WARPS; w++) {
          const float2 other = shared.bias_sums[w][lane];
          sum = {sum.x + other.x, sum.y + other.y};
        }
        const int64_t part = CHAINED ? static_cast<int64_t>(last.x) * scan.num_tiles + last.z : last.x;
        const int channel = last.y + 2 * lane;
        if (channel < D) *reinterpret_cast<float2*>(scan.bias_parts + part * D + channel) = sum;
      }
    }
    const int4 item = shared.queue[k % QUEUE];
    if (item.w < 0) break;
    load(k + STAGES - 1);
    const int drawn = thread == 0 ? draw() : 0;
    const int next_reset = reset_at(shared.queue[(k + 1) % QUEUE]);

    const Stage<BACKWARD>& stage = shared.stages[k % STAGES];
    const int64_t sequence = item.x;
    const int tile = item.z, channel = item.y + 2 * lane;
    const int start = tile * TILE + warp * ROWS;
    const int count = T - start;  // of positions left; may be negative
    const unsigned cuts = __ballot_sync(~0u, reset);
    const bool is_plain = cuts == 0 && count > ROWS;  // no reset, no end, and the state before position 0 is not here
    const float2 bias = *reinterpret_cast<const float2*>(&stage.bias[2 * lane]);
    const float2 offset = {bias.x * -1.4426950408889634f, bias.y * -1.4426950408889634f};
    const float2 initial = *reinterpret_cast<const float2*>(&stage.state[2 * lane]);
    const float2 given = BACKWARD ? *reinterpret_cast<const float2*>(&stage.grad_final[2 * lane]) : initial;
    const uint32_t* xs = &stage.rows[0][warp * ROWS][lane];
    constexpr int INPUT = TILE * LANES;

    // Forward v; backward slope and push, the factors of g in the gradients of gate and value.
    float2 gain[ROWS], v[BACKWARD ? 1 : ROWS], slope[BACKWARD ? ROWS : 1], push[BACKWARD ? ROWS : 1];

    auto fold_rows = [&](auto plain) -> Fold {
      constexpr bool PLAIN = decltype(plain)::value;
      Fold fold = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const float2 x = widen(xs[i * LANES]), u = widen(max_or_nan(xs[INPUT + i * LANES], LEAST_VALUES));
        const Gates a = gates(x.x, offset.x, u.x), b = gates(x.y, offset.y, u.y);
        gain[i] = {fmaf(scan.largest_alpha, a.rise, scan.smallest_gain),
                   fmaf(scan.largest_alpha, b.rise, scan.smallest_gain)};
        if (!PLAIN && i >= count) gain[i] = {0.0f, 0.0f};  // past the end nothing changes
        const bool cut = !PLAIN && (cuts >> i & 1);
        if constexpr (BACKWARD) {
          float2 received = widen(xs[3 * INPUT + i * LANES]);
          if (!PLAIN && i == count - 1) received = initial;
          if (cut) received = {0.0f, 0.0f};
          slope[i] = {(scan.largest_alpha * a.fall) * (a.rise * (a.v - received.x)),
                      (scan.largest_alpha * b.fall) * (b.rise * (b.v - received.y))};
          if (!PLAIN && i >= count) slope[i] = {0.0f, 0.0f};
          push[i] = {gain[i].x * fmaf(-a.v, a.v, 1.0f), gain[i].y * fmaf(-b.v, b.v, 1.0f)};
          const float2 r = widen(xs[2 * INPUT + i * LANES]);
          fold.total = {fold.total.x + r.x, fold.total.y + r.y};
          fold.total = {fmaf(-gain[i].x, fold.total.x, fold.total.x), fmaf(-gain[i].y, fold.total.y, fold.total.y)};
        } else {
          v[i] = {a.v, b.v};
          if (cut) fold.total = {0.0f, 0.0f};
          fold.total = {fmaf(gain[i].x, a.v - fold.total.x, fold.total.x),
                        fmaf(gain[i].y, b.v - fold.total.y, fold.total.y)};
        }
        fold.loss = {fmaf(gain[i].x, 1.0f - fold.loss.x, fold.loss.x),
                     fmaf(gain[i].y, 1.0f - fold.loss.y, fold.loss.y)};
        if (BACKWARD && cut) fold.total = {0.0f, 0.0f};
      }
      if (!PLAIN && cuts != 0) fold.loss = {FORGETS, FORGETS};
      return fold;
    };
    const Fold own = is_plain ? fold_rows(std::true_type{}) : fold_rows(std::false_type{});
    shared.folds[warp][lane] = own.words();
    __syncthreads();

    float2* carry = shared.carry[k % 2];
    if constexpr (CHAINED) {
      const int64_t of_column = static_cast<int64_t>(item.w) * scan.num_tiles;
      const int* flags = scan.flags + of_column;
      const int first = tile / GROUP * GROUP;
      Fold whole;
      float2 before = given;
      if (warp == 0) {
        whole = own;
        for (int w = 1; w < WARPS; w++) whole = then(whole, Fold::of(shared.folds[w][lane]));
        __stcg(scan.folds + (of_column + tile) * LANES + lane, whole.words());
        __syncwarp();
        if (lane == 0) store_release(scan.flags + of_column + tile, FOLD_IS_OUT);
        if (first > 0) {
          wait_for(flags + first - 1, STATE_IS_OUT);
          before = __ldcg(scan.group_ends + (of_column + first / GROUP - 1) * LANES + lane);
        }
      } else {
        for (int i = first + warp - 1; i < tile; i += WARPS - 1) {
          wait_for(flags + i, FOLD_IS_OUT);
          shared.earlier_folds[i - first][lane] = __ldcg(scan.folds + (of_column + i) * LANES + lane);
        }
      }
      __syncthreads();
      if (warp == 0) {
        for (int i = first; i < tile; i++) before = apply(Fold::of(shared.earlier_folds[i - first][lane]), before);
        carry[lane] = before;
        if (tile % GROUP == GROUP - 1) {
          __stcg(scan.group_ends + (of_column + tile / GROUP) * LANES + lane, apply(whole, before));
          __syncwarp();
          if (lane == 0) store_release(scan.flags + of_column + tile, STATE_IS_OUT);
        }
      }
      __syncthreads();
    }

    float2 y = CHAINED || tile > 0 ? carry[lane] : given;
    for (int w = 0; w < warp; w++) y = apply(Fold::of(shared.folds[w][lane]), y);

    const int64_t t = BACKWARD ? T - 1 - start : start;
    const int64_t at = (sequence * T + t) * scan.output_row + channel;
    const bool inside = channel < D;
    auto walk_rows = [&](auto plain) {
      constexpr bool PLAIN = decltype(plain)::value;
      bf16* output = scan.output + at;
      [[maybe_unused]] bf16* grad_value = scan.grad_value + at;
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const bool cut = !PLAIN && (cuts >> i & 1), stores = inside && (PLAIN || i < count);
        if constexpr (BACKWARD) {
          const float2 r = widen(xs[2 * INPUT + i * LANES]);
          y = {y.x + r.x, y.y + r.y};
          const float2 change = {y.x * slope[i].x, y.y * slope[i].y};
          bias_sum = {bias_sum.x + change.x, bias_sum.y + change.y};
          if (stores) {
            store(output, round_pair(change));
            store(grad_value, round_pair({y.x * push[i].x, y.y * push[i].y}));
          }
          y = {fmaf(-gain[i].x, y.x, y.x), fmaf(-gain[i].y, y.y, y.y)};
          if (cut) y = {0.0f, 0.0f};
          output -= scan.output_row;
          grad_value -= scan.output_row;
        } else {
          if (cut) y = {0.0f, 0.0f};
          y = {fmaf(gain[i].x, v[i].x - y.x, y.x), fmaf(gain[i].y, v[i].y - y.y, y.y)};
          if (stores) store(output, round_pair(y));
          output += scan.output_row;
        }
      }
    };
    if (is_plain) {
      walk_rows(std::true_type{});
    } else {
      walk_rows(std::false_type{});
    }

    if (count > 0 && count <= ROWS && inside) *reinterpret_cast<float2*>(scan.final + sequence * D + channel) = y;
    if (!CHAINED && warp == WARPS - 1) shared.carry[(k + 1) % 2][lane] = y;
    if (BACKWARD && (CHAINED || tile == scan.num_tiles - 1)) {
      shared.bias_sums[warp][lane] = bias_sum;
      bias_sum = {0.0f, 0.0f};
    }
    if (thread == 0) shared.queue[(k + STAGES) % QUEUE] = item_of(drawn);
    reset = next_reset;
  }
}

template <bool BACKWARD, bool CHAINED>
cudaError_t blocks_of(int* found) {
  const auto kernel = diagonal_scan<BACKWARD, CHAINED>;
  constexpr int BYTES = sizeof(Shared<BACKWARD>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(found, kernel, THREADS, BYTES);
}

template <bool BACKWARD, bool CHAINED>
cudaError_t run(const Scan& scan, int grid, cudaStream_t stream) {
  diagonal_scan<BACKWARD, CHAINED><<<grid, THREADS, sizeof(Shared<BACKWARD>), stream>>>(scan);
  return cudaGetLastError();
}

}  // namespace

// Each returns a cudaError_t; `diagonal_scan_error` names it.

// Positions of a tile, and how many blocks a multiprocessor holds at once; once per device before the first launch.
extern "C" int diagonal_scan_tiling(int device, int backward, int chained, int* tile, int* blocks) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  *tile = backward ? Tiling<true>::TILE : Tiling<false>::TILE;
  if (backward) return chained ? blocks_of<true, true>(blocks) : blocks_of<true, false>(blocks);
  return chained ? blocks_of<false, true>(blocks) : blocks_of<false, false>(blocks);
}

// Pointers and sizes in the order of `Scan`.
extern "C" int diagonal_scan_launch(int device, int backward, int chained, int grid, const void* gate,
                                    const void* value, const void* h, const void* grad_h, const void* bias,
                                    const void* state, const void* grad_final, const void* reset, void* output,
                                    void* grad_value, void* final, void* bias_parts, void* folds, void* group_ends,
                                    void* flags, void* tickets, int64_t gate_batch, int64_t value_batch,
                                    int64_t grad_batch, int gate_row, int value_row, int grad_row, int output_row,
                                    int num_positions, int num_channels, int num_columns, int num_tiles,
                                    float largest_alpha, float smallest_gain, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  Scan scan;
  scan.gate = static_cast<const bf16*>(gate);
  scan.value = static_cast<const bf16*>(value);
  scan.h = static_cast<const bf16*>(h);
  scan.grad_h = static_cast<const bf16*>(grad_h);
  scan.bias = static_cast<const float*>(bias);
  scan.state = static_cast<const float*>(state);
  scan.grad_final = static_cast<const float*>(grad_final);
  scan.reset = static_cast<const unsigned char*>(reset);
  scan.output = static_cast<bf16*>(output);
  scan.grad_value = static_cast<bf16*>(grad_value);
  scan.final = static_cast<float*>(final);
  scan.bias_parts = static_cast<float*>(bias_parts);
  scan.folds = static_cast<float4*>(folds);
  scan.group_ends = static_cast<float2*>(group_ends);
  scan.flags = static_cast<int*>(flags);
  scan.tickets = static_cast<int*>(tickets);
  scan.gate_batch = gate_batch;
  scan.value_batch = value_batch;
  scan.grad_batch = grad_batch;
  scan.gate_row = gate_row;
  scan.value_row = value_row;
  scan.grad_row = grad_row;
  scan.output_row = output_row;
  scan.num_positions = num_positions;
  scan.num_channels = num_channels;
  scan.num_columns = num_columns;
  scan.num_tiles = num_tiles;
  scan.largest_alpha = largest_alpha;
  scan.smallest_gain = smallest_gain;
  const auto on = static_cast<cudaStream_t>(stream);
  if (backward) return chained ? run<true, true>(scan, grid, on) : run<true, false>(scan, grid, on);
  return chained ? run<false, true>(scan, grid, on) : run<false, false>(scan, grid, on);
}

extern "C" const char* diagonal_scan_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
