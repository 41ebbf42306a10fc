#include "testing/testing.h"

#include <array>
#include <vector>

#include "attention/decode_slots.h"
#include "attention/hopper_backward_plan.h"
#include "common/hopper_layout.h"
#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

std::array<int, 2> bounds_of(const Strips& strips) { return {strips.begin, strips.end}; }

// The head, whether it is the image's, and the first place.
std::array<int, 3> numbers_of(const PairOfTiles& pair) { return {pair.head, pair.image, pair.first}; }

// Where a block of the backward has what in shared memory, as two rounds of the ring find it.
template <class Layout>
py::dict places_of() {
  std::vector<uint32_t> tiles, strips, statistics, barriers;
  for (int operand = 0; operand < Layout::OPERANDS; ++operand) {
    for (int group = 0; group < PAIR; ++group) tiles.push_back(tile_place<Layout>(operand, group));
  }
  for (uint32_t n = 0; n < 2 * Layout::STAGES; ++n) {
    strips.push_back(strips_place<Layout>(n));
    if (Layout::STATISTICS_BYTES != 0) statistics.push_back(statistics_place<Layout>(n));
    barriers.push_back(barriers_place<Layout>(n));
  }
  return py::dict("tiles"_a = tiles, "strips"_a = strips, "statistics"_a = statistics, "barriers"_a = barriers,
                  "tiles_barrier"_a = Layout::TILES_BARRIER, "end"_a = Layout::BYTES);
}

}  // namespace

DALLE_BINDINGS(testing, m) {
  m.def(
      "elementwise",
      [](int function, uintptr_t input, uintptr_t output, int64_t count, uintptr_t) {
        const Elementwise params{ElementwiseFunction{function}, pointer<const float>(input), pointer<float>(output),
                                 count};
        DALLE_RUN(elementwise, params, );
      },
      "function"_a, "input"_a, "output"_a, "count"_a, "executor"_a);
  m.def(
      "uniform_noise",
      [](int64_t seed, int64_t offset, int64_t columns, int64_t rows, uintptr_t v) {
        const UniformNoise params{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), columns, rows,
                                  pointer<float>(v)};
        DALLE_RUN(uniform_noise, params, );
      },
      "seed"_a, "offset"_a, "columns"_a, "rows"_a, "v"_a);

  // What the attention kernel for Hopper GPUs computes of a pattern, and where it looks into shared memory.
  m.def("swizzled_offset", &swizzled_offset, "row"_a, "piece"_a);
  m.def("tile_descriptor", &tile_descriptor, "address"_a);
  m.def("moved_descriptor", &moved, "descriptor"_a, "bytes"_a);
  m.def("mask_below", &mask_below, "columns"_a, "lane"_a);
  m.def("tile_of_turn", &tile_of_turn, "first"_a, "turn"_a, "group"_a, "groups"_a);
  py::class_<HopperPlan>(m, "HopperPlan")
      .def(py::init([](int kind, int64_t seq, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size,
                       const std::array<int, 2>& steps, int head_dim, int groups) {
             HopperPlan plan;
             const char* failed =
                 plan_pattern({PatternKind{kind}, seq, text_len, height, width, kernel_size}, plan);
             if (failed == nullptr) failed = plan_steps(plan, {steps[0], steps[1]}, head_dim, groups);
             if (failed != nullptr) throw std::invalid_argument(failed);
             return plan;
           }),
           "kind"_a, "seq"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "steps"_a, "head_dim"_a,
           "groups"_a)
      .def_readonly("text_len", &HopperPlan::text_len)
      .def_readonly("text_tiles", &HopperPlan::text_tiles)
      .def_readonly("tiles", &HopperPlan::tiles)
      .def_readonly("step", &HopperPlan::step)
      .def_readonly("stages", &HopperPlan::stages)
      .def_readonly("text_slots", &HopperPlan::text_slots)
      .def_property_readonly("masks", &masks_of)
      .def("window",
           [](const HopperPlan& plan, int first) {
             const Window window = window_of(plan, plan.step, first);
             return std::array<int, 3>{window.start, window.begin, window.end};
           },
           "first"_a)
      .def("mask_of", &mask_of, "first"_a, "step"_a)
      .def("window_mask", &window_mask, "mask"_a, "row"_a, "lane"_a)
      .def("token_of", &token_of, "image"_a, "place"_a)
      .def("tile_cost", &tile_cost, "tile"_a)
      .def("share_begin",
           [](const HopperPlan& plan, int heads, int share, int shares) {
             return share_begin(plan, head_cost(plan), heads, share, shares);
           },
           "heads"_a, "share"_a, "shares"_a)
      .def("shared_layout", [](const HopperPlan& plan, int head_dim, int groups) {
        const SharedLayout at = shared_layout(plan, head_dim, groups);
        return std::array<int, 10>{at.text, at.windows, at.barriers, at.text_barriers, at.window_barriers,
                                   at.mask_barrier, at.end_barrier, at.again, at.masks, at.end};
      }, "head_dim"_a, "groups"_a, "Where all but the queries, which come first, begin in a block's shared memory.")
      // Of the backward, whose plan comes from hopper_backward_plan.
      .def_property_readonly("query_masks", &query_masks)
      .def_property_readonly("key_masks", &key_masks)
      .def("tiles_of", &tiles_of, "image"_a)
      .def("keys_seen",
           [](const HopperPlan& plan, bool image, int first) { return bounds_of(keys_seen(plan, image, first)); },
           "image"_a, "first"_a)
      .def("queries_seeing",
           [](const HopperPlan& plan, bool image, int first) { return bounds_of(queries_seeing(plan, image, first)); },
           "image"_a, "first"_a)
      .def("query_mask", &query_mask, "image"_a, "first"_a, "strip"_a)
      .def("key_mask", &key_mask, "image"_a, "first"_a, "strip"_a)
      .def("query_mask_word", &query_mask_word, "mask"_a, "thread"_a)
      .def("key_mask_word", &key_mask_word, "mask"_a, "thread"_a)
      .def("pairs_of", &pairs_of, "image"_a)
      .def("pair_of_queries",
           [](const HopperPlan& plan, int block) { return numbers_of(pair_of_queries(plan, block)); }, "block"_a)
      .def("pair_of_keys",
           [](const HopperPlan& plan, int block, int heads) { return numbers_of(pair_of_keys(plan, block, heads)); },
           "block"_a, "heads"_a);
  m.def(
      "hopper_backward_plan",
      [](int kind, int64_t seq, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size) {
        HopperPlan plan;
        const char* failed = plan_pattern({PatternKind{kind}, seq, text_len, height, width, kernel_size}, plan);
        if (failed != nullptr) throw std::invalid_argument(failed);
        plan_strips(plan);
        return plan;
      },
      "kind"_a, "seq"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a);
  m.def("hopper_backward_layouts", [] {
    return std::array{places_of<QueryLayout<64>>(), places_of<KeyLayout<64>>(), places_of<QueryLayout<128>>(),
                      places_of<KeyLayout<128>>()};
  });
  m.def("columns_below", &columns_below, "columns"_a, "lane"_a);

  m.def(
      "decode_slots",
      [](int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size, int64_t slots, int token) {
        const DecodePattern pattern =
            decode_pattern({PatternKind{kind}, 0, text_len, height, width, kernel_size}, slots);
        const DecodePlace place = decode_place(pattern, token);
        std::vector<int> seen{place.own};
        for (int number = 0; number < pattern.numbers + 8; ++number) {  // more are asked for than there are
          const VisibleSlot slot = visible_slot(pattern, place, number);
          if (slot.seen) seen.push_back(slot.slot);
        }
        return seen;
      },
      "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "slots"_a, "token"_a,
      "An image token's own slot, then the others that a decode step on a GPU takes.");
}
