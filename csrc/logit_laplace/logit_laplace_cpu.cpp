#include "logit_laplace/logit_laplace.h"

#include "common/parallel.h"
#include "common/vector_math.h"
#include "common/vector_pair.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t BLOCK = LOGIT_LAPLACE_BLOCK;
constexpr int64_t BLOCKS_A_THREAD = 8;  // are worth waking one for
constexpr float LN_2 = 0.693147182f;

// Runs of any stride and dtype to floats, and back.
template <class T>
void widen(const T* from, int64_t stride, float* to, int64_t count) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Pair::width <= count; i += Pair::width) store_pair(to + i, load_pair(from + i));
  }
  for (; i < count; ++i) to[i] = to_float(from[i * stride]);
}

template <class T>
void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + Pair::width <= count; i += Pair::width) store_pair(to + i, load_pair(from + i));
  for (; i < count; ++i) from_float(from[i], to[i]);
}

// Reads a tensor in the order of its shape, a block at a time.
class Input {
 public:
  explicit Input(const LogitLaplaceTensor& tensor)
      : data_(tensor.data), dtype_(tensor.dtype), shape_(merged(tensor.shape)) {}

  // Elements [begin, begin + count) in float: where they lie if they lie there so, else in `buffer`.
  const float* read(int64_t begin, int64_t count, float* buffer) const {
    const int64_t length = row_length(shape_), stride = shape_.strides[shape_.dims - 1];
    int64_t row = begin / length, column = begin % length;
    if (dtype_ == Dtype::float32 && stride == 1 && column + count <= length) {
      return static_cast<const float*>(data_) + row_offset(shape_, row) + column;
    }
    for (int64_t done = 0; done < count; ++row, column = 0) {
      const int64_t run = length - column < count - done ? length - column : count - done;
      copy(row_offset(shape_, row) + column * stride, stride, buffer + done, run);
      done += run;
    }
    return buffer;
  }

 private:
  void copy(int64_t offset, int64_t stride, float* to, int64_t count) const {
    switch (dtype_) {
      case Dtype::float16: return widen(static_cast<const Half*>(data_) + offset, stride, to, count);
      case Dtype::bfloat16: return widen(static_cast<const BFloat16*>(data_) + offset, stride, to, count);
      default: return widen(static_cast<const float*>(data_) + offset, stride, to, count);
    }
  }

  const void* data_;
  Dtype dtype_;
  Strided shape_;
};

// Writes a contiguous tensor a block at a time, out of `buffer` unless it is of floats already.
class Output {
 public:
  Output(void* data, Dtype dtype) : data_(data), dtype_(dtype) {}

  float* place(int64_t begin, float* buffer) const {
    return dtype_ == Dtype::float32 ? static_cast<float*>(data_) + begin : buffer;
  }
  void write(int64_t begin, int64_t count, const float* buffer) const {
    if (dtype_ == Dtype::float16) narrow(buffer, static_cast<Half*>(data_) + begin, count);
    if (dtype_ == Dtype::bfloat16) narrow(buffer, static_cast<BFloat16*>(data_) + begin, count);
  }

 private:
  void* data_;
  Dtype dtype_;
};

struct Buffer {
  float values[BLOCK];
};

// Calls body(first element, how many) for every block.
template <class Body>
void for_each_block(int64_t elements, int threads, const Body& body) {
  parallel_for(logit_laplace_blocks(elements), BLOCKS_A_THREAD, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * BLOCK;
      body(begin, elements - begin < BLOCK ? elements - begin : BLOCK);
    }
  });
}

DALLE_INLINE Vector absolute(Vector x) { return as_float(as_integer(x) & broadcast_integer(0x7fffffffu)); }

// The natural logarithm of a positive, finite, normal number.
DALLE_INLINE Vector log_of_normal(Vector x) {
  const IntegerVector exponent = exponent_of(x);
  const Vector m = as_float(as_integer(x) - shift_left<23>(exponent));
  return log_of_parts(m - broadcast(1.0f), to_float(exponent));
}

template <bool NORMAL>
DALLE_INLINE Vector log_of(Vector x) {
  return NORMAL ? log_of_normal(x) : natural_log(x);
}

// Whether every x lies well inside (0, 1), as all pixels do that map_pixels made: then the logarithms need no care.
bool all_inside(const float* x, int64_t count) {
  Vector lowest = broadcast(1.0f);
  int64_t i = 0;
  for (; i + Vector::width <= count; i += Vector::width) {
    const Vector pixel = load(x + i);
    // A NaN as the second operand would be taken and then lost: it is made to look outside.
    lowest = minimum(lowest, select_less(broadcast(0x1p-100f), pixel, broadcast(1.0f) - pixel, broadcast(-1.0f)));
  }
  bool inside = -largest_lane(broadcast(0.0f) - lowest) > 0;
  for (; i < count; ++i) inside &= x[i] > 0x1p-100f && x[i] < 1;
  return inside;
}

template <bool INSIDE>
DALLE_INLINE Vector loss_of(Vector x, Vector mu, Vector log_b) {
  const Vector log_x = log_of<INSIDE>(x), log_complement = log_of<INSIDE>(broadcast(1.0f) - x);
  const Vector deviation = absolute(log_x - log_complement - mu);
  const Vector inverse_b = exponential(broadcast(0.0f) - log_b);
  return multiply_add(deviation, inverse_b, log_b) + (log_x + log_complement) + broadcast(LN_2);
}

// A sum in double of losses that come a register at a time; up to SHORT of them are added in float first.
class Sum {
 public:
  void add(Vector x) {
    part_ = part_ + x;
    if (++count_ == SHORT) flush();
  }
  void add_each(const float* losses, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total_ += losses[i];
  }
  double total() {
    flush();
    return total_;
  }

 private:
  static constexpr int SHORT = 8;
  void flush() {
    float values[Vector::width];
    store(values, part_);
    double sums[Vector::width];
    for (int i = 0; i < Vector::width; ++i) sums[i] = values[i];
    for (int step = Vector::width / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
    }
    total_ += sums[0];
    part_ = broadcast(0.0f);
    count_ = 0;
  }

  Vector part_ = broadcast(0.0f);
  int count_ = 0;
  double total_ = 0;
};

template <bool INSIDE>
void block_losses(const float* x, const float* mu, const float* log_b, int64_t count, float* loss) {
  for (int64_t i = 0; i < count; i += Vector::width) {
    const int64_t left = count - i;
    const Vector pixel = load_first(x + i, left), location = load_first(mu + i, left);
    store_first(loss + i, left, loss_of<INSIDE>(pixel, location, load_first(log_b + i, left)));
  }
}

template <bool INSIDE>
double block_sum(const float* x, const float* mu, const float* log_b, int64_t count) {
  Sum sum;
  int64_t i = 0;
  for (; i + Vector::width <= count; i += Vector::width) {
    sum.add(loss_of<INSIDE>(load(x + i), load(mu + i), load(log_b + i)));
  }
  if (i < count) {
    float losses[Vector::width];
    block_losses<INSIDE>(x + i, mu + i, log_b + i, count - i, losses);
    sum.add_each(losses, count - i);
  }
  return sum.total();
}

template <bool INSIDE>
void block_gradients(const float* grad, float divisor, const float* x, const float* mu, const float* log_b,
                     int64_t count, float* grad_mu, float* grad_log_b) {
  const Vector zero = broadcast(0.0f), one = broadcast(1.0f);
  for (int64_t i = 0; i < count; i += Vector::width) {
    const int64_t left = count - i;
    const Vector pixel = load_first(x + i, left);
    const Vector inverse_b = exponential(zero - load_first(log_b + i, left));
    const Vector d = log_of<INSIDE>(pixel / (one - pixel)) - load_first(mu + i, left);
    // Not times an inverse, which would have been rounded before: the same error in every gradient.
    const Vector g = load_first(grad + i, left) / broadcast(divisor);
    const Vector sign = select_less(zero, d, one, select_less(d, zero, zero - one, zero));
    store_first(grad_mu + i, left, zero - g * sign * inverse_b);
    store_first(grad_log_b + i, left, g * (one - absolute(d) * inverse_b));
  }
}

}  // namespace

const char* logit_laplace_loss(const LogitLaplaceLoss& p) {
  const Input x(p.x), mu(p.mu), log_b(p.log_b);
  const int64_t elements = element_count(p.x.shape);
  for_each_block(elements, p.threads, [&](int64_t begin, int64_t count) {
    Buffer buffers[3];
    const float* pixels = x.read(begin, count, buffers[0].values);
    const float* locations = mu.read(begin, count, buffers[1].values);
    const float* scales = log_b.read(begin, count, buffers[2].values);
    const bool inside = all_inside(pixels, count);
    if (p.partial != nullptr) {
      const auto sum = inside ? block_sum<true> : block_sum<false>;
      p.partial[begin / BLOCK] = sum(pixels, locations, scales, count);
    } else {
      const auto losses = inside ? block_losses<true> : block_losses<false>;
      losses(pixels, locations, scales, count, p.loss + begin);
    }
  });
  if (p.partial == nullptr) return nullptr;
  double total = 0;
  for (int64_t block = 0; block < logit_laplace_blocks(elements); ++block) total += p.partial[block];
  *p.loss = static_cast<float>(total / p.divisor);
  return nullptr;
}

const char* logit_laplace_loss_backward(const LogitLaplaceLossBackward& p) {
  const Input grad(p.grad), x(p.x), mu(p.mu), log_b(p.log_b);
  const Output grad_mu(p.grad_mu, p.mu.dtype), grad_log_b(p.grad_log_b, p.log_b.dtype);
  for_each_block(element_count(p.x.shape), p.threads, [&](int64_t begin, int64_t count) {
    Buffer buffers[6];
    float* to_mu = grad_mu.place(begin, buffers[4].values);
    float* to_log_b = grad_log_b.place(begin, buffers[5].values);
    const float* pixels = x.read(begin, count, buffers[1].values);
    const auto gradients = all_inside(pixels, count) ? block_gradients<true> : block_gradients<false>;
    gradients(grad.read(begin, count, buffers[0].values), static_cast<float>(p.divisor), pixels,
              mu.read(begin, count, buffers[2].values), log_b.read(begin, count, buffers[3].values), count, to_mu,
              to_log_b);
    grad_mu.write(begin, count, to_mu);
    grad_log_b.write(begin, count, to_log_b);
  });
  return nullptr;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
