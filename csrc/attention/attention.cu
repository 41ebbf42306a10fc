// Attention for Hopper GPUs: text keys and values stay in shared memory for a head, windows come a step at a time.
//
// A block goes through a share of all heads' tiles of 64 queries, in order, so that consecutive tiles share a head and
// its text. Each of its warpgroups has a tile and a window of its own. A warp brings what they need by bulk tensor
// copies (hopper_producer.h), they multiply with wgmma (hopper_consumer.h), and what a pattern means for tiles, steps
// and masks is in hopper_plan.h.
//
// Floor, on an H200 (132 multiprocessors; 2,048 multiply-adds and 16 exponentials a cycle each), batch 8, 62 heads of
// 64, text 256, 32 x 32 image tokens, bfloat16: 76 us of memory traffic. `row` visits 401,408 pairs a head, 25,088
// cycles of the tensor cores, of which 346,112 need an exponential, 21,632 cycles; that is 54 and 46 us at 1.75 GHz if
// all overlap.
//
// Reached: row 147 us, column 146, conv 208, where cuDNN's dense causal attention takes 291. With a text of 257 it was
// 161, 160 and 237, when the last token took a whole tile's room and conv steps of 64 for want of it; not timed since.
// The form before, with maxima that rise throughout, took 159, 151 and 218 beside one that took 151, 145 and 204.
// Triton's kernels take 205, 206 and 352.
//
// Of the 10,370 cycles that a warpgroup of the form before took for a tile of row, 3,510 were exponentials with the
// values' products among them (2,040 if it had the unit to itself), 2,070 maxima and masks, 1,600 waits for products,
// 1,440 the results, and 730 what comes between text and window. The window's step took 2,890 for 24 exponentials:
// pieces of it that are skipped keep the others from overlapping. The first text arrived after 7 us, for all of shared
// memory was asked for at once; now queries and one text come first. Copies and stores alone take 99 us.
// One warpgroup alone takes 278 us, two take 184.
//
// One more step of the same keys cost row 10 us, so steps are as large as registers allow: two text tiles a step saved
// 1 to 3 us, conv's window in three steps of 80 keys instead of four of 64 saved 12. Adding one text tile's values
// while the other's weights are made saved 2 to 3. Shares of equal cost and masks made during the first copies saved
// conv 6 and the others nothing.
//
// What did not help: asking for the next step's scores before this one's softmax, and for the next tile's before the
// end of this one, cost row 8 us and conv 47, for registers then held but 48 keys a step, and column nothing; a cubic
// polynomial for every fourth exponential cost such a form 9 to 16 us. Stores of 8 bytes with half the shuffles, or the
// values of halves of a window, changed at most 2 us. With four warpgroups products had to wait for each other for want
// of registers, and row took 174 us. Products under way from one step to the next, the assembler makes wait for each
// other, with three warpgroups as with two. What may help and was not timed: a window without skipped pieces, and a
// lock by which the three warps of a scheduler take turns at exponentials.
#include <cmath>
#include <iterator>
#include <type_traits>

#include "attention/attention.h"
#include "attention/hopper_consumer.h"
#include "attention/hopper_operand.h"
#include "attention/hopper_producer.h"
#include "common/cuda.h"

namespace dalle::cuda {
namespace {

// The table of masks, by all consumers, while the first copies are on their way.
template <int GROUPS>
__device__ void make_masks(const HopperPlan& plan, uint32_t* masks, uint32_t barrier) {
  for (int i = threadIdx.x; i < masks_of(plan) * 256; i += GROUPS * 128) {
    const int thread = i / 2 % 128;
    masks[i] = window_mask(plan, i / 256, thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, thread % 4);
  }
  barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}

template <class Element, int HEAD_DIM, int STEP, int GROUPS>
__global__ void __launch_bounds__(THREADS<GROUPS>, 1) forward(const __grid_constant__ Launch launch) {
#if defined(DALLE_HOPPER)
  uint8_t* memory = dynamic_shared();
  const HopperPlan& plan = launch.plan;
  const Shared shared{launch.layout, plan, shared_address(memory)};
  if (threadIdx.x == 0) {
    const auto init = [](uint32_t barrier, int readers) {
      barrier_init(barrier, 1);
      barrier_init(barrier + FREE, readers * 4);  // a warp each
    };
    for (int group = 0; group < GROUPS; ++group) init(shared.query_barrier(group), 1);
    for (int slot = 0; slot < plan.text_slots; ++slot) init(shared.text_barrier(slot), GROUPS);
    for (int i = 0; i < GROUPS * plan.stages; ++i) init(shared.window_barrier(0, i), 1);
    // Threads that have written for others arrive themselves, as racecheck can follow.
    barrier_init(shared.mask_barrier(), GROUPS * 128);
    barrier_init(shared.end_barrier(), GROUPS * 128);
    shared.again() = 0;
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < GROUPS * 128) {
    keep_registers<CONSUMER_REGISTERS<GROUPS>, true>();
    make_masks<GROUPS>(plan, reinterpret_cast<uint32_t*>(memory + launch.layout.masks), shared.mask_barrier());
    Consumer<Element, HEAD_DIM, STEP, GROUPS> consumer(launch, shared);
    if (!launch.careful) {
      consumer.template run<Maxima::stay>();
      if (!consumer.is_again()) return;
    }
    consumer.template run<Maxima::rise>();
  } else {
    keep_registers<PRODUCER_REGISTERS<GROUPS>, false>();
    if (threadIdx.x >= GROUPS * 128 + 32) return;
    Producer<HEAD_DIM, STEP, GROUPS> producer(launch, shared);
    producer.run();
    if (!launch.careful && producer.is_again()) producer.run();
  }
#endif
}

OperandShape shape_of(const SparseAttention& p) {
  return {p.dtype == Dtype::bfloat16, p.batch, p.heads, p.pattern.seq, p.head_dim};
}

template <class Element, int HEAD_DIM, int STEP, int GROUPS>
const char* launch_forward(const SparseAttention& p, const HopperPlan& plan, cudaStream_t stream) {
  Launch launch{};
  launch.plan = plan, launch.layout = shared_layout(plan, HEAD_DIM, GROUPS);
  launch.heads = static_cast<int>(p.heads), launch.seq = static_cast<int>(p.pattern.seq);
  launch.sign = p.scale > 0 ? 1 : p.scale < 0 ? -1 : 0;
  launch.exponent = launch.sign == 0 ? 1 : fmaxf(fabsf(p.scale) * 1.4426950408889634f, 1e-36f);
  // A maximum of the first keys serves where all queries see some of them, and weights may be large.
  launch.careful = std::is_same_v<Element, Half> || (plan.text_len == 0 && plan.kind != PatternKind::causal);
  launch.all_heads = static_cast<int>(p.batch * p.heads), launch.head_cost = head_cost(plan);
  launch.out = p.out, launch.lse = p.lse;
  const char* failed = make_operand(p.q, shape_of(p), plan, TILE, TILE, launch.q);
  if (failed == nullptr) failed = make_operand(p.k, shape_of(p), plan, STEP, TILE, launch.k);
  if (failed == nullptr) failed = make_operand(p.v, shape_of(p), plan, STEP, TILE, launch.v);
  for (int i = 0; i < 2 && failed == nullptr && plan.text_len > 0; ++i) {
    const BoxedTensor box = boxed(i == 0 ? p.k : p.v, shape_of(p), 0, plan.text_len, last_text_rows(plan));
    failed = make_tensor_map(box, p.dtype == Dtype::bfloat16, launch.last_text[i]);
  }
  if (failed != nullptr) return failed;

  const auto kernel = forward<Element, HEAD_DIM, STEP, GROUPS>;
  failed = status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED));
  if (failed != nullptr) return failed;
  const int processors = max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  const int blocks = min(divided_up(launch.all_heads * plan.tiles, GROUPS), processors);
  void* arguments[] = {&launch};
  return status(cudaLaunchKernel(kernel, dim3(blocks), dim3(THREADS<GROUPS>), arguments, launch.layout.end, stream));
}

// How the work is cut, by the head's width: warpgroups of a block, and the steps to choose from.
template <int HEAD_DIM>
struct Cut {
  static constexpr int GROUPS = 3, STEPS[3] = {96, 80, 64};
};
template <>
struct Cut<128> {
  static constexpr int GROUPS = 2, STEPS[2] = {64, 32};
};

template <class Element, int HEAD_DIM, int CHOICE = 0>
const char* launch_step(const SparseAttention& p, const HopperPlan& plan, cudaStream_t stream) {
  using Cut = Cut<HEAD_DIM>;
  constexpr int STEP = Cut::STEPS[CHOICE];
  if constexpr (CHOICE + 1 < std::size(Cut::STEPS)) {
    if (plan.step != STEP) return launch_step<Element, HEAD_DIM, CHOICE + 1>(p, plan, stream);
  }
  return launch_forward<Element, HEAD_DIM, STEP, Cut::GROUPS>(p, plan, stream);
}

template <class Element>
const char* launch_head_dim(const SparseAttention& p, const HopperPlan& plan, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_step<Element, 64>(p, plan, stream) : launch_step<Element, 128>(p, plan, stream);
}

const char* make_plan(const SparseAttention& p, HopperPlan& plan) {
  const char* failed = hopper_status();
  if (failed != nullptr) return failed;
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16) return "the Hopper kernel takes bfloat16 and float16";
  if (p.head_dim != 64 && p.head_dim != 128) return "the Hopper kernel takes a head_dim of 64 or 128";
  for (const Heads& tensor : {p.q, p.k, p.v}) {
    if (!is_copyable(tensor, shape_of(p))) {
      return "the Hopper kernel takes tensors whose address and strides are multiples of 16 bytes, and not zero";
    }
  }
  failed = plan_pattern(p.pattern, plan);
  if (failed != nullptr) return failed;
  if (p.batch * p.heads * plan.tiles > 1 << 30) return "the Hopper kernel takes up to 2^30 tiles of 64 queries";
  return p.head_dim == 64 ? plan_steps(plan, Cut<64>::STEPS, 64, Cut<64>::GROUPS)
                          : plan_steps(plan, Cut<128>::STEPS, 128, Cut<128>::GROUPS);
}

}  // namespace

const char* sparse_attention_refusal(const SparseAttention& p) {
  HopperPlan plan;
  return make_plan(p, plan);
}

const char* sparse_attention(const SparseAttention& p, void* stream) {
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  HopperPlan plan;
  const char* failed = make_plan(p, plan);
  if (failed != nullptr) return failed;
  return p.dtype == Dtype::bfloat16 ? launch_head_dim<BFloat16>(p, plan, static_cast<cudaStream_t>(stream))
                                    : launch_head_dim<Half>(p, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace dalle::cuda
