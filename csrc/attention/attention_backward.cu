// The backward of attention for Hopper GPUs: queries own dq, keys own dk and dv, and nobody adds to what others own.
//
// Two kernels take turns through the pairs of tiles that see each other, as the Triton kernels do. In both a block is
// two warpgroups with neighbouring tiles of 64 queries or keys, past which strips of 32 keys or queries go through a
// ring in shared memory. Two blocks share a multiprocessor, but of heads of 128 a block has one for itself. The
// gradients of scores stay in registers: they are the next product's left operand. The kernel of dq leaves each query's
// log-sum-exp and grad_out . out for the other, in the order of places (hopper_plan.h). The first of three launches
// writes down which pairs a mask hides.
//
// Floor, on an H200, batch 8, 62 heads of 64, text 256, 32 x 32 image tokens, bfloat16: 650 MB, 152 us. Of `row`
// 401,408 pairs a head are visited, 81 us of the tensor cores for dq (three products) and 108 us for dk and dv (four);
// exponentials take 54 us of either, if all overlap.
//
// Reached: row 527 us, column 509, conv 670, of which the kernel of dq takes 245, 242 and 302, where cuDNN's dense
// causal backward takes 946 and the Triton kernels 609, 744 and 1022. Times grow with the number of strips, by about
// the sum of what their products and their instructions (280 of a warp for dq, 330 for dk and dv) would take alone: 32
// columns are little work for what a strip costs beside, and 64 do not fit into the registers of dk and dv. Heads of 128
// have twice the work a strip, and no GPU has run them.
#include "attention/attention.h"
#include "attention/hopper_backward_keys.h"
#include "attention/hopper_backward_queries.h"
#include "attention/hopper_operand.h"
#include "common/cuda.h"

namespace dalle::cuda {
namespace {

__global__ void __launch_bounds__(128) write_masks(const __grid_constant__ BackwardLaunch launch) {
  const int queries = query_masks(launch.plan), mask = blockIdx.x, thread = threadIdx.x;
  launch.masks[mask * 128 + thread] = mask < queries ? query_mask_word(launch.plan, mask, thread)
                                                     : key_mask_word(launch.plan, mask - queries, thread);
}

template <class Element, int HEAD_DIM>
__global__ void __launch_bounds__(PAIR_THREADS, BLOCKS_BESIDE<HEAD_DIM>)
    query_gradient(const __grid_constant__ BackwardLaunch launch) {
#if defined(DALLE_HOPPER)
  QueryGradient<Element, HEAD_DIM>(launch).run();
#endif
}

template <class Element, int HEAD_DIM>
__global__ void __launch_bounds__(PAIR_THREADS, BLOCKS_BESIDE<HEAD_DIM>)
    key_gradients(const __grid_constant__ BackwardLaunch launch) {
#if defined(DALLE_HOPPER)
  KeyGradients<Element, HEAD_DIM>(launch).run();
#endif
}

OperandShape shape_of(const SparseAttentionBackward& p) {
  return {p.dtype == Dtype::bfloat16, p.batch, p.heads, p.pattern.seq, p.head_dim};
}

using Kernel = void (*)(BackwardLaunch);

const char* run(Kernel kernel, int64_t blocks, int threads, int bytes, BackwardLaunch launch, cudaStream_t stream) {
  const char* failed = status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (failed != nullptr) return failed;
  void* arguments[] = {&launch};
  return status(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, bytes, stream));
}

template <class Element, int HEAD_DIM>
const char* run_all(const SparseAttentionBackward& p, const BackwardLaunch& launch, cudaStream_t stream) {
  const HopperPlan& plan = launch.plan;
  const int64_t blocks = p.batch * p.heads * (pairs_of(plan, false) + pairs_of(plan, true));
  const char* failed = run(write_masks, query_masks(plan) + key_masks(plan), 128, 0, launch, stream);
  if (failed != nullptr) return failed;
  constexpr int QUERY_BYTES = QueryLayout<HEAD_DIM>::BYTES, KEY_BYTES = KeyLayout<HEAD_DIM>::BYTES;
  failed = run(query_gradient<Element, HEAD_DIM>, blocks, PAIR_THREADS, QUERY_BYTES, launch, stream);
  if (failed != nullptr) return failed;
  return run(key_gradients<Element, HEAD_DIM>, blocks, PAIR_THREADS, KEY_BYTES, launch, stream);
}

template <class Element>
const char* run_head_dim(const SparseAttentionBackward& p, const BackwardLaunch& launch, cudaStream_t stream) {
  return p.head_dim == 64 ? run_all<Element, 64>(p, launch, stream) : run_all<Element, 128>(p, launch, stream);
}

int64_t statistics_bytes(const SparseAttentionBackward& p, const HopperPlan& plan) {
  return p.batch * p.heads * plan.tiles * TILE * static_cast<int64_t>(sizeof(Statistics));
}

const char* make_plan(const SparseAttentionBackward& p, HopperPlan& plan) {
  const char* failed = plan_pattern(p.pattern, plan);
  if (failed != nullptr) return failed;
  plan_strips(plan);
  if (p.batch * p.heads * plan.tiles > 1 << 30) return "the Hopper kernel takes up to 2^30 tiles of 64 queries";
  return nullptr;
}

const char* check(const SparseAttentionBackward& p) {
  const char* failed = hopper_status();
  if (failed != nullptr) return failed;
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16) return "the Hopper kernel takes bfloat16 and float16";
  if (p.head_dim != 64 && p.head_dim != 128) return "the Hopper kernel takes a head_dim of 64 or 128";
  for (const Heads& tensor : {p.q, p.k, p.v, p.out, p.grad_out}) {
    if (!is_copyable(tensor, shape_of(p))) {
      return "the Hopper kernel takes tensors whose address and strides are multiples of 16 bytes, and not zero";
    }
  }
  HopperPlan plan;
  return make_plan(p, plan);
}

const char* make_operands(const SparseAttentionBackward& p, BackwardLaunch& launch) {
  const auto make = [&](const Heads& tensor, Operand& operand) {
    return make_operand(tensor, shape_of(p), launch.plan, STRIP, STRIP, operand);
  };
  const char* failed = make(p.q, launch.q);
  if (failed == nullptr) failed = make(p.k, launch.k);
  if (failed == nullptr) failed = make(p.v, launch.v);
  if (failed == nullptr) failed = make(p.out, launch.out);
  if (failed == nullptr) failed = make(p.grad_out, launch.grad_out);
  return failed;
}

}  // namespace

const char* sparse_attention_backward_refusal(const SparseAttentionBackward& p) { return check(p); }

const char* sparse_attention_backward(const SparseAttentionBackward& p, void* stream) {
  BackwardLaunch launch{};
  HopperPlan& plan = launch.plan;
  if (p.workspace != nullptr) *p.workspace = 0;
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  const char* failed = make_plan(p, plan);
  if (failed != nullptr) return failed;
  if (p.workspace != nullptr) {
    *p.workspace = statistics_bytes(p, plan) + (query_masks(plan) + key_masks(plan)) * 128 * int64_t{sizeof(uint32_t)};
    return nullptr;
  }
  failed = check(p);
  if (failed != nullptr) return failed;
  failed = make_operands(p, launch);
  if (failed != nullptr) return failed;
  launch.heads = static_cast<int>(p.heads), launch.all_heads = static_cast<int>(p.batch * p.heads);
  launch.seq = static_cast<int>(p.pattern.seq);
  launch.scale = p.scale, launch.exponent = p.scale * LOG2E;
  launch.dq = p.dq, launch.dk = p.dk, launch.dv = p.dv, launch.lse = p.lse;
  launch.statistics = static_cast<Statistics*>(p.scratch);
  launch.masks = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.scratch) + statistics_bytes(p, plan));
  return p.dtype == Dtype::bfloat16 ? run_head_dim<BFloat16>(p, launch, static_cast<cudaStream_t>(stream))
                                    : run_head_dim<Half>(p, launch, static_cast<cudaStream_t>(stream));
}

}  // namespace dalle::cuda
