#include "attention/plan.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace dalle {
namespace {

struct OwnedPlan : Plan {
  std::vector<int32_t> key_tokens, query_tokens, slot_panels, slot_masks;
  std::vector<Tile> all_tiles;
  std::vector<uint32_t> row_masks;
};

class Planner {
 public:
  Planner(const Pattern& pattern, int panel_width, int tile_rows)
      : pattern_(pattern),
        panel_width_(panel_width),
        tile_rows_(tile_rows),
        text_(std::min(pattern.seq, pattern.text_len)),
        image_(pattern.seq - text_) {}

  const Plan* build() {
    order_image();
    place_keys();
    cut_rows(0, text_, tile_rows_);
    const int64_t run = run_length();
    if (run == 0) {
      cut_rows(text_, image_, tile_rows_);
    } else if (run <= tile_rows_) {
      cut_rows(text_, image_, tile_rows_ / run * run);
    } else {
      const int64_t pieces = (run + tile_rows_ - 1) / tile_rows_;
      for (int64_t start = 0; start < image_; start += run) {
        cut_rows(text_ + start, std::min(run, image_ - start), (run + pieces - 1) / pieces);
      }
    }
    finish();
    return plan_.release();
  }

 private:
  // Patterns that fall into separate runs of neighbours: a tile should not straddle two.
  int64_t run_length() const {
    if (pattern_.kind == PatternKind::axial_row) return pattern_.width;
    // The last row of a prefix may end within the grid, and then columns differ in height: tiles need not match them.
    if (pattern_.kind == PatternKind::column && image_ % pattern_.width == 0) return image_ / pattern_.width;
    return 0;
  }

  // place_[n]: position of image token n in plan order.
  void order_image() {
    place_.resize(image_);
    int64_t next = 0;
    if (pattern_.kind == PatternKind::column) {
      for (int64_t c = 0; c < pattern_.width; ++c) {
        for (int64_t n = c; n < image_; n += pattern_.width) place_[n] = next++;
      }
    } else {
      while (next < image_) place_[next] = next, ++next;
    }
  }

  void place_keys() {
    const int64_t text_panels = (text_ + panel_width_ - 1) / panel_width_;
    const int64_t image_panels = (image_ + panel_width_ - 1) / panel_width_;
    first_image_key_ = text_panels * panel_width_;
    plan_->panels = text_panels + image_panels;
    plan_->key_tokens.assign(plan_->panels * panel_width_, -1);
    plan_->query_tokens.resize(pattern_.seq);
    for (int64_t i = 0; i < text_; ++i) plan_->key_tokens[i] = plan_->query_tokens[i] = i;
    for (int64_t n = 0; n < image_; ++n) {
      plan_->key_tokens[first_image_key_ + place_[n]] = text_ + n;
      plan_->query_tokens[text_ + place_[n]] = text_ + n;
    }
    panel_rows_.assign(plan_->panels * tile_rows_, 0);
  }

  void cut_rows(int64_t first, int64_t count, int64_t rows) {
    for (int64_t start = 0; start < count; start += rows) add_tile(first + start, std::min(rows, count - start));
  }

  void add_tile(int64_t first, int64_t rows) {
    first_panel_ = plan_->panels, last_panel_ = -1;
    for (int64_t i = 0; i < rows; ++i) see_keys(i, plan_->query_tokens[first + i]);
    Tile tile{static_cast<int32_t>(first), static_cast<int32_t>(rows),
              static_cast<int32_t>(plan_->slot_panels.size()), 0};
    for (int64_t panel = first_panel_; panel <= last_panel_; ++panel) {
      uint32_t* masks = &panel_rows_[panel * tile_rows_];
      if (std::all_of(masks, masks + rows, [](uint32_t mask) { return mask == 0; })) continue;
      const uint32_t full = full_mask();
      const bool dense = std::all_of(masks, masks + rows, [full](uint32_t mask) { return mask == full; });
      plan_->slot_panels.push_back(panel);
      plan_->slot_masks.push_back(dense ? -1 : static_cast<int32_t>(plan_->row_masks.size()));
      if (!dense) plan_->row_masks.insert(plan_->row_masks.end(), masks, masks + rows);
      std::fill(masks, masks + rows, 0);
      ++tile.slots;
    }
    plan_->most_slots = std::max(plan_->most_slots, tile.slots);
    plan_->all_tiles.push_back(tile);
  }

  // Marks every key that a query sees: the mask of pattern.py, as runs of keys.
  void see_keys(int64_t row, int64_t token) {
    if (token < text_) return see(row, 0, token);
    see(row, 0, text_ - 1);
    const int64_t n = token - text_, width = pattern_.width, reach = pattern_.kernel_size / 2;
    const int64_t r = n / width, c = n % width;
    switch (pattern_.kind) {
      case PatternKind::causal:
        return see_image(row, 0, n);
      case PatternKind::row:
        return see_image(row, n - width, n);
      case PatternKind::column:
        return see_image(row, place_[c], place_[n]);
      case PatternKind::axial_row:
        return see_image(row, n - c, n);
      case PatternKind::conv:
        for (int64_t dr = 0; dr <= reach; ++dr) {
          see_image(row, n - dr * width - reach, std::min(n, n - dr * width + reach));
        }
        return;
      case PatternKind::conv_corner:
        for (int64_t dr = 0; dr < pattern_.kernel_size && dr <= r; ++dr) {
          see_image(row, n - dr * width - std::min(c, pattern_.kernel_size - 1), n - dr * width);
        }
        return;
    }
  }

  void see_image(int64_t row, int64_t first, int64_t last) {
    see(row, first_image_key_ + std::max<int64_t>(first, 0), first_image_key_ + last);
  }

  void see(int64_t row, int64_t first, int64_t last) {
    if (first > last) return;
    const int64_t from = first / panel_width_, to = last / panel_width_;
    for (int64_t panel = from; panel <= to; ++panel) {
      uint32_t mask = full_mask();
      if (panel == from) mask &= ~0u << (first % panel_width_);
      if (panel == to) mask &= ~0u >> (31 - last % panel_width_);
      panel_rows_[panel * tile_rows_ + row] |= mask;
    }
    first_panel_ = std::min(first_panel_, from);
    last_panel_ = std::max(last_panel_, to);
  }

  uint32_t full_mask() const { return ~0u >> (32 - panel_width_); }

  void finish() {
    plan_->key_token = plan_->key_tokens.data();
    plan_->query_token = plan_->query_tokens.data();
    plan_->tiles = static_cast<int32_t>(plan_->all_tiles.size());
    plan_->tile = plan_->all_tiles.data();
    plan_->slot_panel = plan_->slot_panels.data();
    plan_->slot_mask = plan_->slot_masks.data();
    plan_->row_mask = plan_->row_masks.data();
  }

  const Pattern& pattern_;
  const int64_t panel_width_, tile_rows_, text_, image_;
  int64_t first_image_key_ = 0, first_panel_ = 0, last_panel_ = -1;
  std::vector<int64_t> place_;
  std::vector<uint32_t> panel_rows_;  // [panels, tile_rows]: masks of the tile being built, else all 0
  std::unique_ptr<OwnedPlan> plan_{new OwnedPlan{}};
};

}  // namespace

int32_t Plan::cut(int32_t segment, int32_t segments) const {
  if (segment == segments) return tiles;
  int64_t total = 0, before = 0;
  for (int32_t t = 0; t < tiles; ++t) total += static_cast<int64_t>(tile[t].rows) * tile[t].slots;
  int32_t t = 0;
  while (before * segments < total * segment) before += static_cast<int64_t>(tile[t].rows) * tile[t].slots, ++t;
  return t;
}

const Plan* new_plan(const Pattern& pattern, int panel_width, int tile_rows) {
  return Planner(pattern, panel_width, tile_rows).build();
}

void delete_plan(const Plan* plan) { delete static_cast<const OwnedPlan*>(plan); }

}  // namespace dalle
