#include "core/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/norm.h"

namespace fusedopt::cuda {

namespace {

// Halves the classes of a block over lanes and then within one, in the order of `fold`.
template <class Body>
__device__ double fold_lanes(double (&sums)[Body::kSums]) {
  FUSEDOPT_UNROLL
  for (int half = Body::kSums / 2; half >= Body::kWidth; half /= 2) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  FUSEDOPT_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < Body::kWidth; ++i) sums[i] += __shfl_down_sync(~0u, sums[i], half);
  }
  FUSEDOPT_UNROLL
  for (int half = Body::kWidth / 2; half > 0; half /= 2) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

__device__ double fold_block(double sum, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = sum;
  for (int half = kNormClasses / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  const double all = shared[0];
  __syncthreads();
  return all;
}

static_assert(kThreads == kNormClasses, "a thread a class where the blocks are summed up");

// By one block of threads: the sums of all blocks of the norm, and what follows from them.
__device__ void finish_norm(const Measure& measure, const DecisionInputs& inputs) {
  __shared__ double shared[kNormClasses];
  double with = 0.0;
  double without = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < measure.block_count; i += kNormClasses) {
    // Other blocks of threads wrote them: not from a cache that may have older ones.
    with += __ldcg(&measure.blocks[i].with);
    without += __ldcg(&measure.blocks[i].without);
  }
  const NormSums sums{fold_block(with, shared), fold_block(without, shared)};
  if (threadIdx.x != 0) return;
  if (measure.total != nullptr) *measure.total = sums;
  if (measure.decides != 0) decide(inputs, sums, *measure.decision);
}

// The grid of the updates; see update.cuh. The last block of threads to end sums up what all wrote.
template <class G, class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_norm(DeviceTable table, Measure measure, DecisionInputs inputs) {
  using Body = NormBody<G, T>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const T in = T(weight_in(inputs));
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    const DeviceChunk piece = table.chunks[chunk];
    const DeviceRow& row = table.rows[piece.row];
    const int begin = static_cast<int>(threadIdx.x) / kLanes * static_cast<int>(kNormBlock);
    constexpr int kStep = kThreads / kLanes * static_cast<int>(kNormBlock);
    for (int done = begin; done < piece.count; done += kStep) {
      const int count = min(piece.count - done, static_cast<int>(kNormBlock));
      typename Body::Lane sums;
      Body::sum(table, row, piece.begin + done, count, in, lane, sums);
      const NormSums block{fold_lanes<Body>(sums.with), fold_lanes<Body>(sums.without)};
      if (lane == 0) measure.blocks[row.norm_block + (piece.begin + done) / kNormBlock] = block;
    }
  }
  if (measure.last == 0) return;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&measure.decision->ticket, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) measure.decision->ticket = 0;
    __threadfence();
  }
  __syncthreads();
  if (last) finish_norm(measure, inputs);
}

template <class G, class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_accumulate(DeviceTable table, Epilogue epilogue) {
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    AccumulateBody<G, T>::run(table, epilogue, chunk, static_cast<int>(threadIdx.x), kThreads);
  }
}

}  // namespace

const void* find_norm_kernel(DType grad, DType param) {
  return visit_grad(grad, param, []<class G, class T>(Types<G, T>) {
    return reinterpret_cast<const void*>(&gradient_norm<G, T>);
  });
}

const void* find_accumulate_kernel(DType grad, DType param) {
  return visit_grad(grad, param, []<class G, class T>(Types<G, T>) {
    return reinterpret_cast<const void*>(&gradient_accumulate<G, T>);
  });
}

}  // namespace fusedopt::cuda
