// Baseline of `extract`, one case:  softmax(queries k^T / sqrt(d)) v  with  k, v = LN(x) Wkv^T + bkv
//
//   x [rows, WIDTH]   queries, y [count, INNER]   Wkv [2 INNER, WIDTH] (keys above values), bkv
//
// Split over rows, as flash-decoding: a block takes SPAN rows and GROUP heads, projects 32 rows at a
// time into shared memory and keeps an online softmax per query and head in registers; a second
// kernel merges the spans. Grids: (ceil(rows / SPAN), HEADS / GROUP) and ceil(count INNER / 256).
#include "rows.cuh"

#ifndef WIDTH
#define WIDTH 768
#endif
#ifndef INNER
#define INNER 192
#endif
#ifndef HEADS
#define HEADS 12
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef SPAN
#define SPAN 256
#endif
constexpr int HEAD = INNER / HEADS, COLUMNS = GROUP * HEAD;
// Queries times heads of a group that a thread can own: 128 queries at GROUP = 4.
constexpr int OWNED = 2;
// What a span says of a query and head: largest score, sum of weights, weighted values.
constexpr int STATE = 2 + HEAD;
static_assert(INNER % HEADS == 0 && HEADS % GROUP == 0 && COLUMNS % 32 == 0, "see add_product");
static_assert(WIDTH % STEP == 0 && SPAN % ROWS == 0, "see add_product");

template <class T>
__device__ void extract_span(const T* queries, const T* x, const T* norm_weight, const T* norm_bias,
                             const T* kv_weight, const T* kv_bias, float* partial, int rows, int count,
                             float eps) {
  __shared__ float mean[ROWS], rstd[ROWS], left_tile[ROWS * PITCH], weight_tile[COLUMNS * PITCH];
  __shared__ float kv[2][ROWS][COLUMNS];
  const int first_column = blockIdx.y * COLUMNS;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * ROWS_PER_THREAD;
  const float scale = 1.0f / sqrtf(static_cast<float>(HEAD));

  float query[OWNED][HEAD], out[OWNED][HEAD], largest[OWNED], sum[OWNED];
#pragma unroll
  for (int o = 0; o < OWNED; ++o) {
    const int task = threadIdx.x + o * THREADS;  // query task / GROUP, head task % GROUP of ours
    largest[o] = -INFINITY;
    sum[o] = 0.0f;
#pragma unroll
    for (int d = 0; d < HEAD; ++d) {
      const int at = task / GROUP * INNER + first_column + task % GROUP * HEAD + d;
      query[o][d] = task < count * GROUP ? to_float(queries[at]) * scale : 0.0f;
      out[o][d] = 0.0f;
    }
  }
  const int end = min(rows, static_cast<int>(blockIdx.x + 1) * SPAN);
  for (int first = blockIdx.x * SPAN; first < end; first += ROWS) {
    row_statistics(x, first, rows, WIDTH, eps, mean, rstd);
    __syncthreads();  // and keys and values of the rows before have been read
    auto normed = [&](int r, int c) {
      if (first + r >= rows) return 0.0f;
      const float v = to_float(x[static_cast<size_t>(first + r) * WIDTH + c]);
      return (v - mean[r]) * rstd[r] * to_float(norm_weight[c]) + to_float(norm_bias[c]);
    };
    for (int side = 0; side < 2; ++side) {  // keys, values
      const int column = side * INNER + first_column;
      float acc[ROWS_PER_THREAD][COLUMNS / 32] = {};
      const T* weight = kv_weight + static_cast<size_t>(column) * WIDTH;
      add_product<COLUMNS>(acc, WIDTH, normed, weight, left_tile, weight_tile);
      for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        for (int j = 0; j < COLUMNS / 32; ++j) {
          const int c = lane + 32 * j;
          kv[side][first_row + i][c] = acc[i][j] + to_float(kv_bias[column + c]);
        }
      }
    }
    __syncthreads();
    const int here = min(ROWS, end - first);
#pragma unroll
    for (int o = 0; o < OWNED; ++o) {
      const int task = threadIdx.x + o * THREADS, at = task % GROUP * HEAD;
      if (task >= count * GROUP) continue;
      for (int r = 0; r < here; ++r) {
        float score = 0.0f;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) score += query[o][d] * kv[0][r][at + d];
        const float larger = fmaxf(largest[o], score);
        const float kept = expf(largest[o] - larger), weight = expf(score - larger);
        largest[o] = larger;
        sum[o] = sum[o] * kept + weight;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) out[o][d] = out[o][d] * kept + weight * kv[1][r][at + d];
      }
    }
  }
#pragma unroll
  for (int o = 0; o < OWNED; ++o) {
    const int task = threadIdx.x + o * THREADS;
    if (task >= count * GROUP) continue;
    const int head = blockIdx.y * GROUP + task % GROUP;
    const size_t at = (static_cast<size_t>(blockIdx.x) * HEADS + head) * count + task / GROUP;
    float* state = partial + at * STATE;  // partial [spans, HEADS, count, STATE]
    state[0] = largest[o];
    state[1] = sum[o];
#pragma unroll
    for (int d = 0; d < HEAD; ++d) state[2 + d] = out[o][d];
  }
}

template <class T>
__device__ void merge_spans(const float* partial, T* y, int spans, int count) {
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= count * INNER) return;
  const int query = at / INNER, head = at % INNER / HEAD, d = at % HEAD;
  const size_t step = static_cast<size_t>(HEADS) * count * STATE;
  const float* state = partial + (static_cast<size_t>(head) * count + query) * STATE;
  float largest = -INFINITY, sum = 0.0f, out = 0.0f;
  for (int s = 0; s < spans; ++s) largest = fmaxf(largest, state[s * step]);
  for (int s = 0; s < spans; ++s) {
    const float weight = expf(state[s * step] - largest);
    sum += weight * state[s * step + 1];
    out += weight * state[s * step + 2 + d];
  }
  store(&y[at], out / sum);
}

#define EXTRACT(SUFFIX, T)                                                                        \
  extern "C" __global__ void extract_##SUFFIX(const T* queries, const T* x, const T* norm_weight, \
                                              const T* norm_bias, const T* kv_weight,             \
                                              const T* kv_bias, float* partial, int rows,         \
                                              int count, float eps) {                             \
    extract_span(queries, x, norm_weight, norm_bias, kv_weight, kv_bias, partial, rows, count,    \
                 eps);                                                                            \
  }                                                                                               \
  extern "C" __global__ void merge_##SUFFIX(const float* partial, T* y, int spans, int count) {   \
    merge_spans(partial, y, spans, count);                                                        \
  }
EXTRACT(float32, float)
#ifdef __CUDACC__
EXTRACT(float16, __half)
EXTRACT(bfloat16, __nv_bfloat16)
#endif
