// What both baselines share: element types, the statistics of a LayerNorm, a tiled product.
//
// A block of 256 threads works on 32 rows. Everything is computed in float32 on the ordinary cores:
// these are readable rivals of the Triton kernels, not the fastest CUDA one could write.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

constexpr int ROWS = 32;          // rows of a block
constexpr int THREADS = 256;      // 8 warps, each takes 4 rows of a product
constexpr int STEP = 16;          // depth of a product that is on chip at a time
constexpr int PITCH = STEP + 1;   // odd, so that 32 lanes reading a column meet 32 banks
constexpr int ROWS_PER_THREAD = ROWS / (THREADS / 32);
constexpr unsigned FULL_WARP = 0xffffffffu;

__device__ inline float to_float(float v) { return v; }
__device__ inline void store(float* at, float v) { *at = v; }
#ifdef __CUDACC__
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(__half* at, float v) { *at = __float2half(v); }
__device__ inline void store(__nv_bfloat16* at, float v) { *at = __float2bfloat16(v); }
#endif

__device__ inline float warp_sum(float v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(FULL_WARP, v, lanes);
  return v;
}

// Mean and 1 / standard deviation of rows first .. first + 31 of x [rows, width]; rows past the end
// get zeros. One warp a row; the deviations are summed in a second pass, so a large mean is harmless.
template <class T>
__device__ void row_statistics(const T* x, int first, int rows, int width, float eps, float* mean,
                               float* rstd) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {
    float m = 0.0f, scale = 0.0f;
    if (first + r < rows) {
      const T* row = x + static_cast<size_t>(first + r) * width;
      float sum = 0.0f, squares = 0.0f;
      for (int c = lane; c < width; c += 32) sum += to_float(row[c]);
      m = warp_sum(sum) / width;
      for (int c = lane; c < width; c += 32) {
        const float d = to_float(row[c]) - m;
        squares += d * d;
      }
      scale = rsqrtf(warp_sum(squares) / width + eps);
    }
    if (lane == 0) {
      mean[r] = m;
      rstd[r] = scale;
    }
  }
}

// acc += left [32, depth] weight^T [depth, COLUMNS]; weight is [COLUMNS, depth], row by row.
// A thread holds rows 4 * warp + i and columns lane + 32 * j. left(r, k) is any function; depth is a
// multiple of STEP.
template <int COLUMNS, class Left, class T>
__device__ void add_product(float (&acc)[ROWS_PER_THREAD][COLUMNS / 32], int depth, Left left,
                            const T* weight, float* left_tile, float* weight_tile) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * ROWS_PER_THREAD;
  for (int k0 = 0; k0 < depth; k0 += STEP) {
    __syncthreads();  // the tiles of the step before have been read
    for (int i = threadIdx.x; i < ROWS * STEP; i += THREADS) {
      left_tile[i / STEP * PITCH + i % STEP] = left(i / STEP, k0 + i % STEP);
    }
    for (int i = threadIdx.x; i < COLUMNS * STEP; i += THREADS) {
      const size_t at = static_cast<size_t>(i / STEP) * depth + k0 + i % STEP;
      weight_tile[i / STEP * PITCH + i % STEP] = to_float(weight[at]);
    }
    __syncthreads();
    for (int k = 0; k < STEP; ++k) {
      float w[COLUMNS / 32];
#pragma unroll
      for (int j = 0; j < COLUMNS / 32; ++j) w[j] = weight_tile[(lane + 32 * j) * PITCH + k];
#pragma unroll
      for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const float l = left_tile[(first_row + i) * PITCH + k];
#pragma unroll
        for (int j = 0; j < COLUMNS / 32; ++j) acc[i][j] += l * w[j];
      }
    }
  }
}
