// Tensor maps of the Hopper kernels' operands: boxes of rows at places of a head (hopper_plan.h).
#pragma once

#include "attention/hopper_block.h"
#include "common/tensor_map.h"

namespace dalle::cuda {
namespace {

// A call's tensors [batch, heads, seq, head_dim] but for their addresses and strides.
struct OperandShape {
  bool bfloat16;
  int64_t batch, heads, seq, head_dim;
};

inline BoxedTensor boxed(const Heads& tensor, const OperandShape& shape, int64_t first_token, int64_t tokens,
                         int rows) {
  const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(stride) * 2; };
  BoxedTensor boxed{};
  boxed.data = static_cast<const uint16_t*>(tensor.data) + first_token * tensor.token_stride;
  const uint64_t sizes[5] = {static_cast<uint64_t>(shape.head_dim), static_cast<uint64_t>(tokens), 1,
                             static_cast<uint64_t>(shape.heads), static_cast<uint64_t>(shape.batch)};
  const uint64_t strides[4] = {bytes(tensor.token_stride), 16, bytes(tensor.head_stride), bytes(tensor.batch_stride)};
  const uint32_t box[5] = {TILE_COLUMNS, static_cast<uint32_t>(rows), 1, 1, 1};
  for (int i = 0; i < 5; ++i) boxed.sizes[i] = sizes[i], boxed.box[i] = box[i];
  for (int i = 0; i < 4; ++i) boxed.strides[i] = sizes[i + 1] > 1 ? strides[i] : 16;
  return boxed;
}

// A box of a column pattern is whole columns, or a part of one where they are longer than `rows`.
inline BoxedTensor boxed_image(const Heads& tensor, const OperandShape& shape, const HopperPlan& plan, int rows) {
  if (plan.kind != PatternKind::column) return boxed(tensor, shape, plan.text_len, plan.image_len, rows);
  const int part = plan.segment < rows ? plan.segment : rows;
  BoxedTensor columns = boxed(tensor, shape, plan.text_len - plan.missing, plan.rows, part);
  columns.sizes[2] = static_cast<uint64_t>(plan.width);
  if (plan.rows > 1) columns.strides[0] = static_cast<uint64_t>(plan.width * tensor.token_stride) * 2;
  if (plan.width > 1) columns.strides[1] = static_cast<uint64_t>(tensor.token_stride) * 2;
  columns.box[2] = static_cast<uint32_t>(rows / part);
  return columns;
}

// Boxes of `rows` image places and `text_rows` text tokens.
inline const char* make_operand(const Heads& tensor, const OperandShape& shape, const HopperPlan& plan, int rows,
                                int text_rows, Operand& operand) {
  const char* failed = make_tensor_map(boxed_image(tensor, shape, plan, rows), shape.bfloat16, operand.image);
  if (failed != nullptr || plan.text_len == 0) return failed;
  return make_tensor_map(boxed(tensor, shape, 0, plan.text_len, text_rows), shape.bfloat16, operand.text);
}

// Whether the copy engine reads the tensor as it lies: addresses and strides in whole 16 bytes.
inline bool is_copyable(const Heads& tensor, const OperandShape& shape) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 36);
  };
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && fits(shape.batch, tensor.batch_stride) &&
         fits(shape.heads, tensor.head_stride) && fits(shape.seq, tensor.token_stride);
}

}  // namespace
}  // namespace dalle::cuda
