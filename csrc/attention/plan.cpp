#include "attention/plan.h"

#include <algorithm>
#include <array>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace dalle {
namespace {

struct OwnedPlan : Plan {
  std::vector<int32_t> key_tokens, query_tokens;
  std::vector<Panel> all_panels;
  std::vector<Run> all_runs;
  std::vector<Group> all_groups;
  std::vector<Span> all_spans;
  std::vector<uint32_t> key_masks;
  std::vector<Tile> all_tiles;
};

// A rectangle of the grid whose queries share a panel; height 1 and width 0 stand for neighbours in the order of keys.
struct Block {
  int64_t height, width;
};

class Planner {
 public:
  Planner(const Pattern& pattern, const PlanShape& shape, Block block)
      : pattern_(pattern),
        shape_(shape),
        block_(block),
        text_(std::min(pattern.seq, pattern.text_len)),
        image_(pattern.seq - text_) {
    place_keys();
    cut_text();
    cut_image();
    finish();
  }

  std::shared_ptr<const OwnedPlan> plan() { return std::move(plan_); }
  int64_t cost() const { return cost_; }

 private:
  int64_t padded(int64_t keys) const { return (keys + shape_.key_step - 1) / shape_.key_step * shape_.key_step; }

  // place_[n]: position of image token n in the order of keys.
  void place_keys() {
    place_.resize(image_);
    int64_t next = 0;
    const bool by_column = pattern_.kind == PatternKind::column;
    const int64_t step = by_column ? pattern_.width : 1;
    for (int64_t c = 0; c < step; ++c) {
      for (int64_t n = c; n < image_; n += step) place_[n] = next++;
    }
    plan_->first_image_key = padded(text_);
    plan_->keys = plan_->first_image_key + padded(image_);
    plan_->key_tokens.assign(plan_->keys, -1);
    for (int64_t i = 0; i < text_; ++i) plan_->key_tokens[i] = i;
    for (int64_t n = 0; n < image_; ++n) plan_->key_tokens[plan_->first_image_key + place_[n]] = text_ + n;
    mask_.assign(plan_->keys, 0);
  }

  void cut_text() {
    for (int64_t i = 0; i < text_; ++i) add_query(i);
    end_tile();
  }

  void cut_image() {
    if (block_.width == 0) {
      const int32_t* tokens = &plan_->key_tokens[plan_->first_image_key];
      for (int64_t i = 0; i < image_; ++i) add_query(tokens[i]);
    } else {
      for (int64_t r = 0; r < pattern_.height; r += block_.height) {
        for (int64_t c = 0; c < pattern_.width; c += block_.width) add_block(r, c);
      }
    }
    end_tile();
  }

  // Down its columns, so that groups are rectangles as well, or nearly.
  void add_block(int64_t row, int64_t column) {
    for (int64_t c = column; c < std::min(column + block_.width, pattern_.width); ++c) {
      for (int64_t r = row; r < std::min(row + block_.height, pattern_.height); ++r) {
        if (r * pattern_.width + c < image_) add_query(text_ + r * pattern_.width + c);
      }
    }
    end_panel();
  }

  void add_query(int64_t token) {
    tokens_.push_back(token);
    if (++queries_ == shape_.panel_queries) end_panel();
  }

  void end_panel() {
    if (queries_ == 0) return;
    tokens_.resize((tokens_.size() + shape_.panel_queries - 1) / shape_.panel_queries * shape_.panel_queries, -1);
    counts_.push_back(std::exchange(queries_, 0));
    if (counts_.size() == static_cast<size_t>(shape_.tile_panels)) end_tile();
  }

  void end_tile() {
    end_panel();
    if (counts_.empty()) return;
    int64_t common = plan_->keys;
    for (int32_t token : tokens_) {
      if (token >= 0) common = std::min(common, common_prefix(token));
    }
    common = common / shape_.key_step * shape_.key_step;
    const int32_t image = static_cast<int32_t>(plan_->first_image_key);
    Tile tile{static_cast<int32_t>(plan_->all_panels.size()), static_cast<int32_t>(counts_.size()),
              static_cast<int32_t>(common), image, std::max(image, static_cast<int32_t>(common))};
    if (common <= image) tile.first_image_key = static_cast<int32_t>(plan_->keys);
    for (size_t p = 0; p < counts_.size(); ++p) add_panel(&tokens_[p * shape_.panel_queries], counts_[p], tile);
    tile.first_image_key = std::min(tile.first_image_key, tile.end_image_key);
    plan_->all_tiles.push_back(tile);
    plan_->query_tokens.insert(plan_->query_tokens.end(), tokens_.begin(), tokens_.end());
    tokens_.clear();
    counts_.clear();
  }

  void add_panel(const int32_t* tokens, int32_t queries, Tile& tile) {
    common_ = tile.common_keys;
    first_ = plan_->keys, end_ = common_;
    for (int32_t j = 0; j < queries; ++j) see_keys(1u << j, tokens[j]);
    Panel panel{queries, static_cast<int32_t>(plan_->all_runs.size()), 0, 0,
                static_cast<int32_t>(plan_->all_groups.size()), 0};
    const uint32_t full = queries_of(0, queries);
    each_seen(full, first_, end_, [&](int64_t start, int64_t end) {
      const auto from = mask_.begin() + start, to = mask_.begin() + end;
      const bool dense = std::all_of(from, to, [full](uint32_t mask) { return mask == full; });
      Run run{static_cast<int32_t>(start), static_cast<int32_t>(end - start), -1};
      if (!dense) {
        run.mask = static_cast<int32_t>(plan_->key_masks.size());
        plan_->key_masks.insert(plan_->key_masks.end(), from, to);
      }
      add_run(run, panel, tile);
    });
    plan_->most_keys = std::max(plan_->most_keys, tile.common_keys + panel.keys);
    // Half a panel of lanes or less costs half.
    const int64_t lanes = shape_.panel_queries / (2 * queries <= shape_.panel_queries ? 2 : 1);
    cost_ += lanes * (tile.common_keys + panel.keys);
    for (int32_t first = 0; first < queries;) first += add_group(first, panel, tile);
    if (first_ < end_) std::fill(mask_.begin() + first_, mask_.begin() + end_, 0);
    plan_->all_panels.push_back(panel);
  }

  static uint32_t queries_of(int32_t first, int32_t count) { return ~0u >> (32 - count) << first; }

  // Calls body(start, end) for the keys from `first` to `end` that some of the queries see, in whole key steps.
  template <class Body>
  void each_seen(uint32_t queries, int64_t first, int64_t end, const Body& body) const {
    for (int64_t key = first; key < end;) {
      if ((mask_[key] & queries) == 0) {
        ++key;
        continue;
      }
      const int64_t start = key / shape_.key_step * shape_.key_step;
      while (key < end && (mask_[key] & queries) != 0) ++key;
      key = padded(key);
      body(start, key);
    }
  }

  // The group of a panel's queries from `first` on; returns how many they are.
  int32_t add_group(int32_t first, Panel& panel, const Tile& tile) {
    const int32_t left = panel.queries - first, groups = (left + shape_.group_queries - 1) / shape_.group_queries;
    Group group{first, (left + groups - 1) / groups, static_cast<int32_t>(plan_->all_spans.size()), 0};
    int32_t position = tile.common_keys;
    int64_t keys = tile.common_keys;
    for (int32_t i = panel.first_run; i < panel.first_run + panel.runs; ++i) {
      const Run& run = plan_->all_runs[i];
      const int64_t end = run.first_key + run.keys;
      each_seen(queries_of(first, group.queries), run.first_key, end, [&](int64_t from, int64_t to) {
        const int32_t start = static_cast<int32_t>(from), count = static_cast<int32_t>(to - from);
        plan_->all_spans.push_back({position + start - run.first_key, start, count});
        ++group.spans;
        keys += count;
      });
      position += run.keys;
    }
    cost_ += group.queries * keys;
    plan_->most_spans = std::max(plan_->most_spans, group.spans);
    plan_->all_groups.push_back(group);
    ++panel.groups;
    return group.queries;
  }

  void add_run(const Run& run, Panel& panel, Tile& tile) {
    plan_->all_runs.push_back(run);
    ++panel.runs;
    panel.keys += run.keys;
    if (run.first_key >= plan_->first_image_key) {
      tile.first_image_key = std::min(tile.first_image_key, run.first_key);
      tile.end_image_key = std::max(tile.end_image_key, run.first_key + run.keys);
    }
  }

  // Keys that a query sees without a gap from the first one on.
  int64_t common_prefix(int64_t token) const {
    if (token < text_) return token + 1;
    const bool joined = pattern_.kind == PatternKind::causal && plan_->first_image_key == text_;
    return joined ? token + 1 : text_;
  }

  // Marks every key that a query sees, beyond the common ones: the mask of pattern.py, as runs of keys.
  void see_keys(uint32_t query, int64_t token) {
    if (token < text_) return see(query, 0, token);
    see(query, 0, text_ - 1);
    const int64_t n = token - text_, width = pattern_.width, reach = pattern_.kernel_size / 2;
    const int64_t r = n / width, c = n % width;
    switch (pattern_.kind) {
      case PatternKind::causal:
        return see_image(query, 0, n);
      case PatternKind::row:
        return see_image(query, n - width, n);
      case PatternKind::column:
        return see_image(query, place_[c], place_[n]);
      case PatternKind::axial_row:
        return see_image(query, n - c, n);
      case PatternKind::conv:
        for (int64_t dr = 0; dr <= reach && n - dr * width + reach >= 0; ++dr) {
          see_image(query, n - dr * width - reach, std::min(n, n - dr * width + reach));
        }
        return;
      case PatternKind::conv_corner:
        for (int64_t dr = 0; dr < pattern_.kernel_size && dr <= r; ++dr) {
          see_image(query, n - dr * width - std::min(c, pattern_.kernel_size - 1), n - dr * width);
        }
        return;
    }
  }

  void see_image(uint32_t query, int64_t first, int64_t last) {
    see(query, plan_->first_image_key + std::max<int64_t>(first, 0), plan_->first_image_key + last);
  }

  void see(uint32_t query, int64_t first, int64_t last) {
    first = std::max<int64_t>(first, common_);
    if (first > last) return;
    for (int64_t key = first; key <= last; ++key) mask_[key] |= query;
    first_ = std::min(first_, first);
    end_ = std::max(end_, last + 1);
  }

  void finish() {
    plan_->key_token = plan_->key_tokens.data();
    plan_->query_token = plan_->query_tokens.data();
    plan_->panel = plan_->all_panels.data();
    plan_->run = plan_->all_runs.data();
    plan_->group = plan_->all_groups.data();
    plan_->span = plan_->all_spans.data();
    plan_->key_mask = plan_->key_masks.data();
    plan_->tile = plan_->all_tiles.data();
    plan_->tiles = static_cast<int32_t>(plan_->all_tiles.size());
  }

  const Pattern& pattern_;
  const PlanShape shape_;
  const Block block_;
  const int64_t text_, image_;
  int64_t common_ = 0, first_ = 0, end_ = 0, cost_ = 0;
  int32_t queries_ = 0;           // in the panel that is being filled
  std::vector<int32_t> tokens_;   // of the tile that is being filled
  std::vector<int32_t> counts_;   // queries in its panels
  std::vector<int64_t> place_;
  std::vector<uint32_t> mask_;    // [keys]: masks of the panel being built, else all 0
  std::shared_ptr<OwnedPlan> plan_ = std::make_shared<OwnedPlan>();
};

// The cheapest of the ways to cut the image.
std::shared_ptr<const OwnedPlan> best_plan(const Pattern& pattern, const PlanShape& shape) {
  std::vector<Block> blocks{{1, 0}};
  if (pattern.kind == PatternKind::conv || pattern.kind == PatternKind::conv_corner) {
    for (int64_t height : {2, 4}) blocks.push_back({height, shape.panel_queries / height});
  }
  const int64_t most = shape.panel_queries;
  if (pattern.kind == PatternKind::axial_row) blocks.push_back({1, std::min(pattern.width, most)});
  if (pattern.kind == PatternKind::column) blocks.push_back({std::min(pattern.height, most), 1});
  std::shared_ptr<const OwnedPlan> best;
  int64_t least = 0;
  for (const Block& block : blocks) {
    Planner planner(pattern, shape, block);
    if (best == nullptr || planner.cost() < least) least = planner.cost(), best = planner.plan();
  }
  return best;
}

using Key = std::array<int64_t, 10>;

Key key_of(const Pattern& p, const PlanShape& s) {
  return {static_cast<int64_t>(p.kind), p.seq,           p.text_len,    p.height,  p.width, p.kernel_size,
          s.panel_queries,              s.group_queries, s.tile_panels, s.key_step};
}

// Most recently used first. A model has a few patterns, a server a few prefixes of each.
struct Cache {
  static constexpr size_t MOST = 32;
  std::mutex mutex;
  std::list<std::pair<Key, std::shared_ptr<const OwnedPlan>>> entries;
  std::list<std::shared_ptr<const OwnedPlan>> borrowed;
};

Cache& cache() {
  static Cache* const kept = new Cache;  // never destroyed: a thread may still compute while the process exits
  return *kept;
}

}  // namespace

int32_t Plan::cut(int32_t segment, int32_t segments) const {
  if (segment == segments) return tiles;
  const auto work = [this](int32_t t) {
    int64_t keys = 0;
    for (int32_t p = 0; p < tile[t].panels; ++p) keys += tile[t].common_keys + panel[tile[t].first_panel + p].keys;
    return keys;
  };
  int64_t total = 0, before = 0;
  for (int32_t t = 0; t < tiles; ++t) total += work(t);
  int32_t t = 0;
  while (before * segments < total * segment) before += work(t++);
  return t;
}

const Plan* borrow_plan(const Pattern& pattern, const PlanShape& shape) {
  const Key key = key_of(pattern, shape);
  Cache& kept = cache();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  auto found = std::find_if(kept.entries.begin(), kept.entries.end(), [&](const auto& e) { return e.first == key; });
  if (found == kept.entries.end()) {
    kept.entries.emplace_front(key, best_plan(pattern, shape));
    if (kept.entries.size() > Cache::MOST) kept.entries.pop_back();
  } else {
    kept.entries.splice(kept.entries.begin(), kept.entries, found);
  }
  kept.borrowed.push_front(kept.entries.front().second);
  return kept.borrowed.front().get();
}

void return_plan(const Plan* plan) {
  Cache& kept = cache();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  const auto same = [plan](const auto& borrowed) { return borrowed.get() == plan; };
  kept.borrowed.erase(std::find_if(kept.borrowed.begin(), kept.borrowed.end(), same));
}

}  // namespace dalle
