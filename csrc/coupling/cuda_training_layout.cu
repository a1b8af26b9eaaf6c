#include "coupling/cuda_training_layout.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "common/simt.h"
#include "coupling/cuda_gradients.h"

namespace fasthyp::coupling::cuda::training {

CouplingPlaces places_of(const Coupling& coupling, bool gradient) {
  CouplingPlaces places{};
  const auto take = [](int& end, int count) {
    const int at = end;
    end += up4(count);
    return at;
  };
  take(places.width, coupling.outputs);
  for (const Net& net : coupling.nets) {
    auto& layers = places.nets.emplace_back();
    for (const Dense& d : net.layers) {
      const auto value = [&](bool needed) { return needed ? take(places.width, d.out) : -1; };
      const auto hoisted = [&](bool needed) { return needed ? take(places.hoisted, d.out) : -1; };
      Places p;
      p.result = &d == &net.layers.back() ? net.raw_at : value(true);
      p.before_gate = value(gradient && d.gate_weight >= 0);
      p.before_norm = value(d.keep || (gradient && d.scale >= 0));
      p.before_activation =
          value(gradient && d.activate && !derivative_of_result(net.activation, net.slope));
      p.hoisted = hoisted(d.cond_weight >= 0);
      p.gate = hoisted(d.gate_weight >= 0);
      layers.push_back(p);
    }
  }
  return places;
}

Parts::Parts(std::int64_t m, std::int64_t n, std::int64_t k) {
  constexpr std::int64_t kBlocks = 256, kLeast = 256;  // rows of a part
  const std::int64_t tiles = (m + 63) / 64 * ((n + 127) / 128);
  most = std::clamp(kBlocks / std::max<std::int64_t>(tiles, 1), std::int64_t{1},
                    std::max<std::int64_t>((k + kLeast - 1) / kLeast, 1));
  length = static_cast<int>(((k + most - 1) / most + 15) / 16 * 16);
  count = length > 0 ? static_cast<int>((k + length - 1) / length) : 1;
}

bool split_by_image(const Dense& d, std::int64_t images, std::int64_t per_image) {
  constexpr std::int64_t kLeast = 96, kMostNumbers = 4 << 20;
  return d.cond_weight >= 0 && d.in > 0 && per_image >= kLeast &&
         images * d.out * d.in <= kMostNumbers;
}

Layout::Layout(const Plan& plan, std::int64_t images_in_all, std::int64_t rows_of_image, Keep keep,
               bool gradient, std::int64_t scratch) {
  const std::int64_t per_image = per_image_ = std::max<std::int64_t>(rows_of_image, 1);
  int widest = plan.dim;
  for (const Step& step : plan.steps) {
    if (const auto* l = std::get_if<Linear>(&step)) {
      dense |= !l->diagonal;
      continue;
    }
    const auto& c = std::get<Coupling>(step);
    const CouplingPlaces places = places_of(c, gradient || keep.store);
    values = std::max(values, places.width);
    hoisted = std::max(hoisted, places.hoisted);
    raw = std::max(raw, up4(c.outputs));
    for (const Net& net : c.nets)
      for (const Dense& d : net.layers) {
        if (&d != &net.layers.back()) hidden = std::max(hidden, up4(d.out));
        keeps |= d.keep;
        widest = std::max(widest, d.out);
      }
  }
  const int states = (dense ? 2 : 1) * (gradient ? 2 : 1) * up4(plan.dim);
  const int kept = gradient && keeps ? up4(widest) : 0;
  const int own_values = keep.store ? 0 : values;
  const std::int64_t row =
      4 * (std::int64_t{states} + own_values + (gradient ? 2 * hidden + raw + kept : 0));
  const std::int64_t image = 4 * (std::int64_t{hoisted} + (gradient ? widest : 0));
  constexpr std::int64_t kLeast = 64, kMost = 16384, kEven = 128;
  const std::int64_t all = images_in_all * rows_of_image;
  rows = std::clamp(scratch / (row + image / per_image + 1), kLeast, kMost);
  if (rows >= per_image && per_image > 1)
    rows = rows / per_image * per_image;  // whole images
  else if (rows > kEven)
    rows = rows / kEven * kEven;
  rows = std::min(rows, all);
  images = std::min(images_in_all, (rows + per_image - 2) / per_image + 1);
  pieces = pieces_of(std::min(per_image, rows));

  const auto take = [&](std::int64_t numbers) {
    const std::int64_t from = total;
    total += (numbers * 4 + 255) / 256 * 256;
    return from;
  };
  at_slots = take(static_cast<std::int64_t>(plan.slots.size()));
  const std::int64_t state = rows * plan.dim;
  at_state = take(state);
  at_other = take(dense ? state : 0);
  at_grad = take(gradient ? state : 0);
  at_grad_other = take(gradient && dense ? state : 0);
  at_values = take(rows * own_values);
  at_hoisted = take(images * hoisted);
  at_grad_raw = take(gradient ? rows * raw : 0);
  for (auto& at : at_grad_hidden) at = take(gradient ? rows * hidden : 0);
  at_grad_kept = take(rows * kept);
  at_image_grad = take(gradient ? images * widest : 0);
  at_partial = take(gradient ? partial(plan, widest) : 0);
}

std::int64_t Layout::partial(const Plan& plan, int widest) const {
  std::int64_t most = std::max(images * pieces, std::int64_t{pieces_of(rows)}) * widest;
  const auto weight = [&](std::int64_t m, std::int64_t n, std::int64_t k) {
    most = std::max(most, Parts(m, n, k).most * (m * n + m));
    most = std::max(most, Parts(m, 0, k).most * m);  // the bias alone
  };
  for (const Step& step : plan.steps) {
    if (const auto* c = std::get_if<Coupling>(&step)) {
      for (const Net& net : c->nets)
        for (const Dense& d : net.layers) {
          weight(d.out, d.in, rows);
          if (split_by_image(d, images, per_image_)) most = std::max(most, images * d.out * d.in);
          if (d.cond_weight >= 0 || d.gate_weight >= 0) weight(d.out, plan.cond_dim, images);
        }
    } else {
      weight(plan.dim, plan.dim, rows);
    }
  }
  return most;
}

std::int64_t saved_width(const Plan& plan, Keep keep) {
  const auto steps = static_cast<std::int64_t>(plan.steps.size());
  const std::int64_t state = up4(plan.dim);
  if (!keep.store) return keep.every > 0 ? (steps + keep.every - 1) / keep.every * state : 0;
  std::int64_t width = steps * state;
  for (const Step& step : plan.steps)
    if (const auto* c = std::get_if<Coupling>(&step)) width += places_of(*c, true).width;
  if (width > std::numeric_limits<int>::max())
    throw std::invalid_argument("coupling pass: too much to store");
  return width;
}

std::int64_t workspace_bytes(const Plan& plan, std::int64_t images, std::int64_t per_image,
                             Keep keep, bool gradient, std::int64_t scratch) {
  if (images * per_image == 0) return 0;
  return Layout(plan, images, per_image, keep, gradient, scratch).total;
}

}  // namespace fasthyp::coupling::cuda::training
