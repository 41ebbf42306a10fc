#include "gumbel_softmax/gumbel_softmax.h"

#include <type_traits>

#include "common/cuda.h"
#include "gumbel_softmax/statistics.h"

namespace dalle::cuda {
namespace {

// logits + gumbel, in place of the logits.
template <class Team>
__device__ __forceinline__ void add_noise(const GumbelNoise& noise, const Team& team, typename Team::Columns& scores) {
  const RowNoise row(*noise.seed, *noise.offset + team.row());
#pragma unroll
  for (int group = 0; group < Team::GROUPS; ++group) {
    float logs[GROUP];
    row.log2_exponentials(team.counter(group), logs);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) scores[group][i] = fmaf(logs[i], -LN_2, scores[group][i]);
  }
}

// Of total / columns, since that is near 1 where the KL is near 0.
__device__ __forceinline__ float divergence(float total, float moment, int64_t columns) {
  const float kl = (moment / total - log2f(total / static_cast<float>(columns))) * LN_2;
  return kl < 0.0f ? 0.0f : kl;
}

// The first column with the largest score, as a float; every thread of the row gets it.
template <class Team>
__device__ __forceinline__ float first_largest(const Team& team, const typename Team::Columns& scores, float largest,
                                               typename Team::template Shared<LargestNumber>& shared) {
  LargestNumber chosen;  // less the column
  chosen.clear();
#pragma unroll
  for (int group = 0; group < Team::GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const float column = static_cast<float>(team.column(group) + i);
      if (scores[group][i] == largest) chosen.largest[0] = fmaxf(chosen.largest[0], -column);
    }
  }
  team.merge(chosen, shared);
  return -chosen.largest[0];
}

// The threads of a block, and for a cluster its blocks, are as many as the columns take.
template <class Team, bool WITH_KL, bool HARD>
__global__ void __launch_bounds__(Team::MOST_THREADS,
                                  WITH_KL && HARD ? Team::LEAST_BLOCKS_HARD_WITH_KL : Team::LEAST_BLOCKS)
    forward(const __grid_constant__ GumbelSoftmax p, uint32_t rows) {
  constexpr int GROUPS = Team::GROUPS;
  using Sums = Statistics<1, 0, WITH_KL>;
  __shared__ typename Team::template Shared<Sums> shared;
  __shared__ typename Team::template Shared<LargestNumber> shared_choice;
  const Team team(rows, p.columns);
  Sums sums(LOG2_E / *p.noise.tau);
  typename Team::Columns sample;
  team.load_given(team.row_of(p.logits), -INFINITY, sample);
  if constexpr (WITH_KL) sums.template add_posterior<GROUPS>(sample);
  add_noise(p.noise, team, sample);

  sums.largest[0] = largest_of<GROUPS>(sample);
  const float own_largest = sums.largest[0];
  const Exponent exponent(sums.scale, own_largest);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float part[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      part[i] = fast_exp2(exponent(sample[group][i]));
      if constexpr (!HARD) sample[group][i] = part[i];
    }
    sums.sums[0] += (part[0] + part[1]) + (part[2] + part[3]);
  }
  team.meet();
  team.merge(sums, shared);
  if constexpr (WITH_KL) {
    if (team.writes_row()) p.kl[team.row()] = divergence(sums.sums[Sums::TOTAL], sums.sums[Sums::MOMENT], p.columns);
  }

  // A row that holds NaN or +inf, or nothing but -inf, has a sum of NaN or 0 and is NaN.
  const float inverse = 1.0f / sums.sums[0];
  if constexpr (HARD) {
    const float chosen = first_largest(team, sample, sums.largest[0], shared_choice), zero = inverse * 0.0f;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        sample[group][i] = zero + (static_cast<float>(team.column(group) + i) == chosen ? 1.0f : 0.0f);
      }
    }
  } else {
    const float factor = carry_of(own_largest, sums.largest[0], sums.scale) * inverse;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) sample[group][i] *= factor;
    }
  }
  team.store(team.row_of(p.y), sample);
}

// The soft sample is `y`; where that is a one-hot it is drawn again.
template <class Team, bool WITH_KL, bool HARD>
__global__ void __launch_bounds__(Team::MOST_THREADS, HARD ? Team::LEAST_BLOCKS_HARD : Team::LEAST_BLOCKS)
    backward(const __grid_constant__ GumbelSoftmaxBackward p, uint32_t rows) {
  constexpr int GROUPS = Team::GROUPS;
  using Sums = Statistics<2 * HARD, !HARD, WITH_KL>;  // of y * grad_y, and of the exponentials of a sample drawn again
  __shared__ typename Team::template Shared<Sums> shared;
  const Team team(rows, p.columns);
  const float tau = *p.noise.tau;
  Sums sums(LOG2_E / tau);
  typename Team::Columns gradient, logits, sample;
  if constexpr (WITH_KL || HARD) team.load_given(team.row_of(p.logits), -INFINITY, logits);
  team.load_given(team.row_of(p.grad_y), 0.0f, gradient);
  if constexpr (WITH_KL) sums.template add_posterior<GROUPS>(logits);
  if constexpr (!HARD) team.load(team.row_of(p.y), 0.0f, sample);
  const Exponent of_q(LOG2_E, sums.largest[WITH_KL ? Sums::OF_LOGITS : 0]);
  float own_largest = 0.0f;
  if constexpr (HARD) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) sample[group][i] = logits[group][i];
    }
    add_noise(p.noise, team, sample);
    sums.largest[0] = own_largest = largest_of<GROUPS>(sample);
  }
  const Exponent exponent(sums.scale, own_largest);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if constexpr (HARD) {
        sample[group][i] = fast_exp2(exponent(sample[group][i]));
        sums.sums[1] += sample[group][i];
      }
      sums.sums[0] = fmaf(sample[group][i], gradient[group][i], sums.sums[0]);
    }
  }
  float own_largest_logit = 0.0f;
  if constexpr (WITH_KL) own_largest_logit = sums.largest[Sums::OF_LOGITS];
  team.meet();
  team.merge(sums, shared);

  float factor = 1.0f / tau, dot = sums.sums[0], weight = 0.0f, mean = 0.0f;
  if constexpr (HARD) {
    const float inverse = 1.0f / sums.sums[1];
    factor *= carry_of(own_largest, sums.largest[0], sums.scale) * inverse;
    dot *= inverse;
  }
  if constexpr (WITH_KL) {
    // Of exponents relative to this thread's largest logit.
    const float to = sums.largest[Sums::OF_LOGITS];
    const float total = sums.sums[Sums::TOTAL];
    weight = row_number(p.grad_kl, team.row()) / total * LN_2 * carry_of(own_largest_logit, to, LOG2_E);
    mean = sums.sums[Sums::MOMENT] / total - step_of(own_largest_logit, to, LOG2_E);
  }
  const auto finish = [&](auto begin, auto end) {
    constexpr int BEGIN = decltype(begin)::value, END = decltype(end)::value;
    // Again, from the cache, rather than kept all along.
    if constexpr (WITH_KL) team.template load_given<BEGIN, END>(team.row_of(p.logits), -INFINITY, logits);
#pragma unroll
    for (int group = BEGIN; group < END; ++group) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        float result = sample[group][i] * factor * (gradient[group][i] - dot);
        if constexpr (WITH_KL) {
          const float exponent_of_q = of_q(logits[group][i]);
          result = fmaf(fast_exp2(exponent_of_q) * weight, bounded(exponent_of_q) - mean, result);
        }
        gradient[group][i] = result;
      }
    }
    team.template store<BEGIN, END>(team.row_of(p.grad_logits), gradient);
  };
  // By halves, for which the registers suffice.
  using std::integral_constant;
  finish(integral_constant<int, 0>(), integral_constant<int, GROUPS / 2>());
  finish(integral_constant<int, GROUPS / 2>(), integral_constant<int, GROUPS>());
}

RowTensor with_merged_rows(const RowTensor& tensor) {
  return {tensor.data, plain::merged(tensor.rows), tensor.column_stride};
}

template <class Params>
const char* launch_teams(void (*kernel)(Params, uint32_t), const TeamShape& shape, const Params& p, uint32_t rows,
                         cudaStream_t stream) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return status(cudaLaunchKernelEx(&config, kernel, p, rows));
}

template <class Team, bool HARD>
const char* run_kind(const GumbelSoftmax& p, const TeamShape& shape, uint32_t rows, cudaStream_t stream) {
  const bool with_kl = p.kl != nullptr;
  return launch_teams(with_kl ? forward<Team, true, HARD> : forward<Team, false, HARD>, shape, p, rows, stream);
}
template <class Team, bool HARD>
const char* run_kind(const GumbelSoftmaxBackward& p, const TeamShape& shape, uint32_t rows, cudaStream_t stream) {
  const bool with_kl = p.grad_kl.data != nullptr;
  return launch_teams(with_kl ? backward<Team, true, HARD> : backward<Team, false, HARD>, shape, p, rows, stream);
}

template <class Team, class Params>
const char* run_soft(const Params& p, const TeamShape& shape, uint32_t rows, cudaStream_t stream) {
  return run_kind<Team, false>(p, shape, rows, stream);
}
template <class Team, class Params>
const char* run(const Params& p, const TeamShape& shape, uint32_t rows, cudaStream_t stream) {
  return p.hard ? run_kind<Team, true>(p, shape, rows, stream) : run_kind<Team, false>(p, shape, rows, stream);
}

// The tensors that have the columns of a call: those that the caller gives, and all.
template <class Holds>
bool all_given(const GumbelSoftmax& p, const Holds& holds) {
  return holds(p.logits);
}
template <class Holds>
bool all_given(const GumbelSoftmaxBackward& p, const Holds& holds) {
  return holds(p.grad_y) && holds(p.logits);
}
template <class Holds>
bool all_of(const GumbelSoftmax& p, const Holds& holds) {
  return all_given(p, holds) && holds(p.y);
}
template <class Holds>
bool all_of(const GumbelSoftmaxBackward& p, const Holds& holds) {
  return all_given(p, holds) && holds(p.y) && holds(p.grad_logits);
}

bool lies_apart(const RowTensor& tensor) {
  return tensor.column_stride != 1 && tensor.rows.strides[tensor.rows.dims - 1] == 1;
}

// By a cluster, or false. One-hot samples have the kernels of any layout only.
template <template <Layout> class Cluster, class Params>
bool run_cluster(const Params& p, uint32_t rows, cudaStream_t stream, const char*& error) {
  using Any = Cluster<Layout::ANY>;
  using Whole = Cluster<Layout::WHOLE>;
  using Mixed = Cluster<Layout::MIXED>;
  TeamShape shape;
  const unsigned blocks = most_cluster();
  if (!p.hard && Whole::fit(p.columns, rows, blocks, shape)) {
    error = all_given(p, Mixed::is_near) ? run_soft<Mixed>(p, shape, rows, stream)
                                         : run_soft<Whole>(p, shape, rows, stream);
    return true;
  }
  if (!Any::fit(p.columns, rows, blocks, shape)) return false;
  error = run<Any>(p, shape, rows, stream);
  return true;
}

// By the team that reads whole pieces of memory: a cluster where of some tensor columns lie apart and rows next to each
// other, since scattered numbers cost more than what the others lose.
template <template <Layout> class Cluster, class WholeBlock, class AnyBlock, class Params>
const char* run_by_layout(const Params& p, uint32_t rows, cudaStream_t stream) {
  const char* error;
  const bool apart = !all_of(p, [](const RowTensor& tensor) { return !lies_apart(tensor); });
  if (apart && run_cluster<Cluster>(p, rows, stream, error)) return error;
  TeamShape shape;
  const bool whole = all_of(p, [&](const RowTensor& tensor) { return WholeBlock::is_whole(tensor, p.columns); });
  if (whole && WholeBlock::fit(p.columns, rows, 1, shape)) return run<WholeBlock>(p, shape, rows, stream);
  if (AnyBlock::fit(p.columns, rows, 1, shape)) return run<AnyBlock>(p, shape, rows, stream);
  return "a row does not fit the registers of a block";
}

template <class T>
struct Clusters {
  template <Layout LAYOUT>
  using Forward = RowCluster<T, 8, 256, 3, 8, LAYOUT>;
  template <Layout LAYOUT>
  using Backward = RowCluster<T, 8, 256, LAYOUT == Layout::ANY ? 1 : 2, 8, LAYOUT>;  // ANY wants for registers
};

template <class T>
const char* run_by_layout(const GumbelSoftmax& p, uint32_t rows, cudaStream_t stream) {
  return run_by_layout<Clusters<T>::template Forward, RowBlock<T, 8, 512, 2, true>, RowBlock<T, 8, 512, 1, false>>(
      p, rows, stream);
}
template <class T>
const char* run_by_layout(const GumbelSoftmaxBackward& p, uint32_t rows, cudaStream_t stream) {
  return run_by_layout<Clusters<T>::template Backward, RowBlock<T, 8, 256, 2, true>, RowBlock<T, 8, 256, 1, false>>(
      p, rows, stream);
}

template <class Params>
const char* run_any(const Params& p, cudaStream_t stream) {
  const uint32_t rows = static_cast<uint32_t>(plain::element_count(p.logits.rows));
  if (rows == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::float32: return run_by_layout<float>(p, rows, stream);
    case Dtype::float16: return run_by_layout<Half>(p, rows, stream);
    case Dtype::bfloat16: return run_by_layout<BFloat16>(p, rows, stream);
    default: return "unknown dtype";
  }
}

}  // namespace

const char* gumbel_softmax(const GumbelSoftmax& call, void* stream) {
  GumbelSoftmax p = call;
  for (RowTensor* tensor : {&p.logits, &p.y}) *tensor = with_merged_rows(*tensor);
  return run_any(p, static_cast<cudaStream_t>(stream));
}

const char* gumbel_softmax_backward(const GumbelSoftmaxBackward& call, void* stream) {
  GumbelSoftmaxBackward p = call;
  for (RowTensor* tensor : {&p.grad_y, &p.logits, &p.y, &p.grad_kl, &p.grad_logits}) {
    *tensor = with_merged_rows(*tensor);
  }
  return run_any(p, static_cast<cudaStream_t>(stream));
}

}  // namespace dalle::cuda
