// The backward's kernels for Hopper GPUs behind a function that Python's ctypes can call.
#include "attention/attention.h"

// `numbers`: dtype, batch, heads, kind, seq, text_len, height, width, kernel_size; `tensors`: address and three strides
// each of grad_out, q, k, v, out, dq, dk and dv. With `workspace` it tells the bytes of `scratch` alone.
extern "C" __attribute__((visibility("default"))) const char* attention_backward(
    const int64_t* numbers, const int64_t* tensors, float scale, const float* lse, void* scratch, int64_t* workspace,
    void* stream) {
  using namespace dalle;
  const auto tensor = [&](int i) {
    const int64_t* t = tensors + 4 * i;
    return Heads{reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]};
  };
  SparseAttentionBackward p{};
  p.dtype = Dtype(numbers[0]), p.batch = numbers[1], p.heads = numbers[2], p.head_dim = 64;
  p.pattern = {PatternKind(numbers[3]), numbers[4], numbers[5], numbers[6], numbers[7], numbers[8]};
  p.scale = scale, p.grad_out = tensor(0), p.q = tensor(1), p.k = tensor(2), p.v = tensor(3), p.out = tensor(4);
  p.dq = tensor(5), p.dk = tensor(6), p.dv = tensor(7), p.lse = lse, p.scratch = scratch, p.workspace = workspace;
  return cuda::sparse_attention_backward(p, stream);
}
