// The Hopper kernel's producer: one warp, of which a thread serves each warpgroup with its tiles' queries and windows,
// and one more all of them with text. A thread asks for its next copy when the place for it is free and never waits, so
// no warpgroup is held up by another.
#pragma once

#include "attention/hopper_block.h"

namespace dalle::cuda {
namespace {

template <int HEAD_DIM, int STEP, int GROUPS>
struct Producer {
  const Launch& launch;
  const Shared shared;
  const Share share;
  const int lane;
  bool active = false;       // whether there is something left to ask for
  int head = 0;
  Ring ring{0, 1};           // of window steps, or of text: all places are free at first
  int text_tile = 0;         // the text's thread's next copy
  int turn = 0, tile = 0;    // of a warpgroup's thread
  int step = -1;             // its next copy: a step of the window, or before them the queries
  Window window{};
  uint32_t query_parity = 1;

  __device__ Producer(const Launch& launch_, const Shared& shared_)
      : launch(launch_), shared(shared_), share(launch_), lane(threadIdx.x % 32) {
    if (lane == 0) {
      for (const Operand* operand : {&launch.q, &launch.k, &launch.v}) {
        prefetch_tensor_map(&operand->image);
        if (launch.plan.text_len > 0) prefetch_tensor_map(&operand->text);
      }
      if (launch.plan.text_len > 0) {
        for (const CUtensorMap& map : launch.last_text) prefetch_tensor_map(&map);
      }
    }
  }

  __device__ void start_tile() {
    tile = tile_of_turn(share.first, turn, lane, GROUPS);
    active = tile < share.last;
    step = -1;
    head = tile / share.tiles;
  }
  __device__ int local_tile() const { return tile - head * share.tiles; }

  __device__ void corner_of(bool image, int place, int (&corner)[5]) const {
    set_rows(launch.plan, image, place, corner);
    corner[3] = head % launch.heads;
    corner[4] = head / launch.heads;
  }

  __device__ bool ask_queries() {
    const uint32_t barrier = shared.query_barrier(lane);
    if (!barrier_test(barrier + FREE, query_parity)) return false;
    query_parity ^= 1;
    const int number = local_tile(), first = (number - launch.plan.text_tiles) * TILE;
    const bool image = first >= 0;
    int corner[5];
    corner_of(image, image ? first : number * TILE, corner);
    barrier_arrive_expecting(barrier, launch.layout.query_bytes);
    copy_tile<HEAD_DIM>(shared.queries(lane), TILE, image ? launch.q.image : launch.q.text, corner, barrier);
    window = image ? window_of(launch.plan, STEP, first) : Window{0, 0, 0};
    step = window.begin;
    return true;
  }

  __device__ bool ask_step() {
    const uint32_t barrier = shared.window_barrier(lane, ring.place);
    if (!barrier_test(barrier + FREE, ring.parity)) return false;
    const uint32_t keys = shared.window_keys(lane, ring.place);
    int corner[5];
    corner_of(true, window.start + step * STEP, corner);
    barrier_arrive_expecting(barrier, 2 * launch.layout.step_bytes);
    copy_tile<HEAD_DIM>(keys, STEP, launch.k.image, corner, barrier);
    copy_tile<HEAD_DIM>(keys + launch.layout.step_bytes, STEP, launch.v.image, corner, barrier);
    advance(ring, launch.plan.stages);
    ++step;
    return true;
  }

  __device__ bool ask_text() {
    const uint32_t barrier = shared.text_barrier(ring.place);
    if (!barrier_test(barrier + FREE, ring.parity)) return false;
    const uint32_t keys = shared.text_keys(ring.place);
    const bool last = text_tile + 1 == launch.plan.text_tiles;
    const int rows = last ? last_text_rows(launch.plan) : TILE;
    const int bytes = last ? launch.layout.last_text_bytes : launch.layout.text_bytes;
    int corner[5];
    corner_of(false, text_tile * TILE, corner);
    barrier_arrive_expecting(barrier, 2 * bytes);
    copy_tile<HEAD_DIM>(keys, rows, last ? launch.last_text[0] : launch.k.text, corner, barrier);
    copy_tile<HEAD_DIM>(keys + bytes, rows, last ? launch.last_text[1] : launch.v.text, corner, barrier);
    advance(ring, launch.plan.text_slots);
    ++text_tile;
    if (last) {
      text_tile = 0;
      active = ++head < share.last_head;
    }
    return true;
  }

  __device__ bool ask() {
    if (!active) return false;
    if (lane == GROUPS) return ask_text();
    const bool asked = step < 0 ? ask_queries() : ask_step();
    if (asked && step == window.end) {
      ++turn;
      start_tile();
    }
    return asked;
  }

  __device__ void start() {
    turn = 0;
    if (lane < GROUPS) start_tile();
    if (lane == GROUPS) {
      head = share.first_head;
      active = launch.plan.text_tiles > 0 && head < share.last_head;
    }
  }

  // The block's first round brings queries and a whole text, for without them nothing begins.
  __device__ void run() {
    start();
    for (int thread = 0; thread <= GROUPS; ++thread) {
      if (lane == thread) {
        for (int n = thread == GROUPS ? launch.plan.text_tiles : 1; n > 0; --n) ask();
      }
      __syncwarp();
    }
    while (__any_sync(~0u, active)) {
      bool asked = false;
      for (int thread = 0; thread <= GROUPS; ++thread) {  // a copy's operands are a warp's
        if (lane == thread) asked = ask();
        __syncwarp();
      }
      if (!__any_sync(~0u, asked)) __nanosleep(200);
    }
  }

  // As the consumers' own.
  __device__ bool is_again() const {
    barrier_wait(shared.end_barrier(), 0);
    return shared.again() != 0;
  }
};

}  // namespace
}  // namespace dalle::cuda
