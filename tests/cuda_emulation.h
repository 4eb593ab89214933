// Just enough CUDA on the CPU to run the baselines of benchmarks/cuda in a test: one thread per CUDA
// thread, blocks one after the other, shared memory as static variables (blocks never overlap).
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

using std::min;

struct Index {
  int x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx;
inline Index blockIdx;

struct Block {
  explicit Block(int threads) : everyone(threads) {
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
    exchanged.resize(threads);
  }
  std::barrier<> everyone;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> exchanged;
};
inline Block* block = nullptr;

inline void __syncthreads() { block->everyone.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  std::barrier<>& warp = *block->warps[threadIdx.x / 32];
  block->exchanged[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float other = block->exchanged[threadIdx.x ^ lanes];
  warp.arrive_and_wait();
  return other;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

// Run a kernel on a grid of columns x rows blocks.
inline void launch(int columns, int rows, int threads, const std::function<void()>& kernel) {
  for (int y = 0; y < rows; ++y) {
    for (int x = 0; x < columns; ++x) {
      Block here(threads);
      block = &here;
      blockIdx = {x, y, 0};
      std::vector<std::thread> running;
      for (int t = 0; t < threads; ++t) {
        running.emplace_back([&, t] {
          threadIdx = {t, 0, 0};
          kernel();
        });
      }
      for (std::thread& one : running) one.join();
    }
  }
}

#define __device__
#define __global__
#define __shared__ static
