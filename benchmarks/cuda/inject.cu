// Baseline of `inject`, one case:  y = x + g * (x + Wo attention(Wq LN(x) + bq, keys, values) + bo)
//
//   x, y            [rows, WIDTH]     tiles
//   keys, values    [tokens, INNER]   modal tokens, HEADS heads side by side
//   Wq [INNER, WIDTH], bq [INNER]     Wo [WIDTH, INNER], bo [WIDTH]     g, norm [WIDTH]
//
// A block takes 32 rows from x to y: statistics, queries (in shared memory), an online softmax over
// the tokens per row and head, the output product in WIDTH / INNER slices. Grid: ceil(rows / 32).
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
constexpr int HEAD = INNER / HEADS;
static_assert(INNER % 32 == 0 && INNER % HEADS == 0 && WIDTH % INNER == 0, "see add_product");
static_assert(WIDTH % STEP == 0 && INNER % STEP == 0, "see add_product");

// One row and head: q [HEAD] becomes sum_j softmax_j(q . k_j / sqrt(HEAD)) v_j.
template <class T>
__device__ void attend(float* q, const T* keys, const T* values, int tokens) {
  const float scale = 1.0f / sqrtf(static_cast<float>(HEAD));
  float query[HEAD], out[HEAD], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int d = 0; d < HEAD; ++d) {
    query[d] = q[d] * scale;
    out[d] = 0.0f;
  }
  for (int j = 0; j < tokens; ++j) {
    float score = 0.0f;
#pragma unroll
    for (int d = 0; d < HEAD; ++d) score += query[d] * to_float(keys[j * INNER + d]);
    const float larger = fmaxf(largest, score);
    const float kept = expf(largest - larger), weight = expf(score - larger);
    largest = larger;
    sum = sum * kept + weight;
#pragma unroll
    for (int d = 0; d < HEAD; ++d) out[d] = out[d] * kept + weight * to_float(values[j * INNER + d]);
  }
#pragma unroll
  for (int d = 0; d < HEAD; ++d) q[d] = out[d] / sum;
}

template <class T>
__device__ void inject(const T* x, const T* keys, const T* values, const T* gamma, const T* norm_weight,
                       const T* norm_bias, const T* query_weight, const T* query_bias,
                       const T* output_weight, const T* output_bias, T* y, int rows, int tokens,
                       float eps) {
  __shared__ float mean[ROWS], rstd[ROWS], left_tile[ROWS * PITCH], weight_tile[INNER * PITCH];
  __shared__ float q[ROWS][INNER];
  const int first = blockIdx.x * ROWS;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * ROWS_PER_THREAD;

  row_statistics(x, first, rows, WIDTH, eps, mean, rstd);
  __syncthreads();
  auto normed = [&](int r, int c) {
    if (first + r >= rows) return 0.0f;
    const float v = to_float(x[static_cast<size_t>(first + r) * WIDTH + c]);
    return (v - mean[r]) * rstd[r] * to_float(norm_weight[c]) + to_float(norm_bias[c]);
  };
  float acc[ROWS_PER_THREAD][INNER / 32] = {};
  add_product<INNER>(acc, WIDTH, normed, query_weight, left_tile, weight_tile);
  for (int i = 0; i < ROWS_PER_THREAD; ++i) {
    for (int j = 0; j < INNER / 32; ++j) {
      const int c = lane + 32 * j;
      q[first_row + i][c] = acc[i][j] + to_float(query_bias[c]);
    }
  }
  __syncthreads();
  // A warp works on one head, its lanes on the 32 rows: they read the same keys at the same time.
  for (int h = threadIdx.x / 32; h < HEADS; h += THREADS / 32) {
    attend(&q[lane][h * HEAD], keys + h * HEAD, values + h * HEAD, tokens);
  }
  __syncthreads();
  auto attended = [&](int r, int c) { return q[r][c]; };
  for (int slice = 0; slice < WIDTH; slice += INNER) {
    float out[ROWS_PER_THREAD][INNER / 32] = {};
    const T* weight = output_weight + static_cast<size_t>(slice) * INNER;
    add_product<INNER>(out, INNER, attended, weight, left_tile, weight_tile);
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
      if (first + first_row + i >= rows) continue;
      for (int j = 0; j < INNER / 32; ++j) {
        const int c = slice + lane + 32 * j;
        const size_t at = static_cast<size_t>(first + first_row + i) * WIDTH + c;
        const float own = to_float(x[at]);
        store(&y[at], own + to_float(gamma[c]) * (own + out[i][j] + to_float(output_bias[c])));
      }
    }
  }
}

#define INJECT(NAME, T)                                                                            \
  extern "C" __global__ void NAME(const T* x, const T* keys, const T* values, const T* gamma,      \
                                  const T* norm_weight, const T* norm_bias, const T* query_weight, \
                                  const T* query_bias, const T* output_weight,                     \
                                  const T* output_bias, T* y, int rows, int tokens, float eps) {   \
    inject(x, keys, values, gamma, norm_weight, norm_bias, query_weight, query_bias,               \
           output_weight, output_bias, y, rows, tokens, eps);                                      \
  }
INJECT(inject_float32, float)
#ifdef __CUDACC__
INJECT(inject_float16, __half)
INJECT(inject_bfloat16, __nv_bfloat16)
#endif
