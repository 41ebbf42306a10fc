#include "float16/float16.h"

#include "common/parallel.h"
#include "float16/codec_pair.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// A thread is worth waking for about this many elements.
constexpr int64_t GRAIN = 32768;

// These return whether the run held an infinity or NaN. Contiguous runs have a loop of their own.
template <Float16Format format, class Element>
bool encode_contiguous(const Element* input, uint16_t* codes, int64_t count) {
  NonfiniteWatch watch;
  int64_t i = 0;
  for (; i + Pair::width <= count; i += Pair::width) {
    const Pair x = load_pair(input + i);
    watch.see(x);
    store_pair(reinterpret_cast<Code<format>*>(codes + i), x);
  }
  bool nonfinite = watch.seen();
  for (; i < count; ++i) {
    const auto bits = encodable_bits(input[i]);
    nonfinite |= is_nonfinite(bits);
    codes[i] = encode_bits<format>(bits);
  }
  return nonfinite;
}

template <Float16Format format>
bool encode_contiguous(const double* input, uint16_t* codes, int64_t count) {
  uint32_t nonfinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = encodable_bits(input[i]);
    nonfinite |= is_nonfinite(bits);
    codes[i] = encode_bits<format>(bits);
  }
  return nonfinite != 0;
}

template <Float16Format format, class Element>
bool encode_run(const Element* input, int64_t stride, uint16_t* codes, int64_t count) {
  if (stride == 1) return encode_contiguous<format>(input, codes, count);
  bool nonfinite = false;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = encodable_bits(input[i * stride]);
    nonfinite |= is_nonfinite(bits);
    codes[i] = encode_bits<format>(bits);
  }
  return nonfinite;
}

template <Float16Format format, class Element>
void decode_contiguous(const uint16_t* codes, Element* output, int64_t count) {
  int64_t i = 0;
  for (; i + Pair::width <= count; i += Pair::width) {
    store_pair(output + i, load_pair(reinterpret_cast<const Code<format>*>(codes + i)));
  }
  for (; i < count; ++i) from_float(decode_code<format>(codes[i]), output[i]);
}

template <Float16Format format>
void decode_contiguous(const uint16_t* codes, double* output, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(decode_code<format>(codes[i]), output[i]);
}

template <Float16Format format, class Element>
void decode_run(const uint16_t* codes, int64_t stride, Element* output, int64_t count) {
  if (stride == 1) return decode_contiguous<format>(codes, output, count);
  for (int64_t i = 0; i < count; ++i) from_float(decode_code<format>(codes[i * stride]), output[i]);
}

// Calls body(offset in the strided tensor, stride, offset in the contiguous one, count) over runs along the last
// dimension.
template <class Body>
void for_each_run(const Strided& shape, int threads, const Body& body) {
  const Strided m = merged(shape);
  const int64_t row = row_length(m), stride = m.strides[m.dims - 1];
  if (row == 0) return;
  if (m.dims == 1) {
    parallel_for(row, GRAIN, threads,
                 [&](int64_t begin, int64_t end) { body(begin * stride, stride, begin, end - begin); });
    return;
  }
  const int64_t rows = element_count(m) / row;
  parallel_for(rows, GRAIN / row + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(row_offset(m, r), stride, r * row, row);
  });
}

template <Float16Format format, class Element>
const char* encode_all(const Float16Encode& p) {
  const Element* input = static_cast<const Element*>(p.input);
  __atomic_store_n(p.nonfinite, uint8_t{0}, __ATOMIC_RELAXED);
  for_each_run(p.shape, p.threads, [&](int64_t from, int64_t stride, int64_t to, int64_t count) {
    // Every thread that stores stores the same: the flag does not depend on their order.
    if (encode_run<format>(input + from, stride, p.codes + to, count)) {
      __atomic_store_n(p.nonfinite, uint8_t{1}, __ATOMIC_RELAXED);
    }
  });
  return nullptr;
}

template <Float16Format format, class Element>
const char* decode_all(const Float16Decode& p) {
  Element* output = static_cast<Element*>(p.output);
  for_each_run(p.shape, p.threads, [&](int64_t from, int64_t stride, int64_t to, int64_t count) {
    decode_run<format>(p.codes + from, stride, output + to, count);
  });
  return nullptr;
}

template <Float16Format format>
const char* encode_any(const Float16Encode& p) {
  switch (p.dtype) {
    case Dtype::float32: return encode_all<format, float>(p);
    case Dtype::float16: return encode_all<format, Half>(p);
    case Dtype::bfloat16: return encode_all<format, BFloat16>(p);
    case Dtype::float64: return encode_all<format, double>(p);
  }
  return "unknown dtype";
}

template <Float16Format format>
const char* decode_any(const Float16Decode& p) {
  switch (p.dtype) {
    case Dtype::float32: return decode_all<format, float>(p);
    case Dtype::float16: return decode_all<format, Half>(p);
    case Dtype::bfloat16: return decode_all<format, BFloat16>(p);
    case Dtype::float64: return decode_all<format, double>(p);
  }
  return "unknown dtype";
}

}  // namespace

const char* float16_encode(const Float16Encode& p) {
  return p.format == Float16Format::fp169 ? encode_any<Float16Format::fp169>(p) : encode_any<Float16Format::fp0610>(p);
}

const char* float16_decode(const Float16Decode& p) {
  return p.format == Float16Format::fp169 ? decode_any<Float16Format::fp169>(p) : decode_any<Float16Format::fp0610>(p);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
