#include "coupling/coupling.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(coupling::Kernels, coupling_kernels)

namespace coupling {
namespace {

constexpr std::int64_t kAlign = 64;
std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

std::size_t element_size(Element e) { return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2; }
std::size_t state_size(Element e) { return e == Element::f64 ? 8 : 4; }

// Vectors per block: the fewest padded vectors win; one vector alone leaves the FMA units waiting
// for broadcasts, so it must be clearly better.
int choose_vectors(int vectors) {
  if (vectors == 1) return 1;
  const int two = static_cast<int>(round_up(vectors, 2)),
            three = static_cast<int>(round_up(vectors, 3));
  return three < two ? 3 : 2;
}

class Reader {
 public:
  explicit Reader(std::span<const std::int64_t> numbers) : numbers_(numbers) {}
  std::int64_t raw() {
    if (at_ >= numbers_.size()) throw std::invalid_argument("flow plan: too short");
    return numbers_[at_++];
  }
  int integer(const char* what, std::int64_t low, std::int64_t high) {
    const std::int64_t v = raw();
    if (v < low || v > high)
      throw std::invalid_argument(std::string("flow plan: ") + what + " must be in [" +
                                  std::to_string(low) + ", " + std::to_string(high) + "], got " +
                                  std::to_string(v));
    return static_cast<int>(v);
  }
  double real() { return std::bit_cast<double>(raw()); }
  std::vector<int> slots(const char* what, int count, int dim) {
    std::vector<int> v(count);
    for (int& s : v) s = integer(what, 0, dim - 1);
    return v;
  }
  bool done() const { return at_ == numbers_.size(); }

 private:
  std::span<const std::int64_t> numbers_;
  std::size_t at_ = 0;
};

constexpr int kMaxWidth = 1 << 20;

bool distinct(std::vector<int> v) {
  std::sort(v.begin(), v.end());
  return std::adjacent_find(v.begin(), v.end()) == v.end();
}

// The first place at which `part` stands in `whole` as one piece; -1: nowhere.
int find(const std::vector<int>& whole, const std::vector<int>& part) {
  const auto at = std::search(whole.begin(), whole.end(), part.begin(), part.end());
  return at == whole.end() && !part.empty() ? -1 : static_cast<int>(at - whole.begin());
}

// Keeps the order of the coupling before if that will do.
void choose_order(Coupling& c, const std::vector<int>& active, const std::vector<int>& passive,
                  const std::vector<int>& before) {
  c.order = before;
  c.active_at = find(before, active);
  c.passive_at = find(before, passive);
  if (c.active_at >= 0 && c.passive_at >= 0) return;
  c.order = active;
  c.order.insert(c.order.end(), passive.begin(), passive.end());
  c.active_at = 0;
  c.passive_at = static_cast<int>(active.size());
  std::vector<bool> placed(before.size(), false);
  for (const int slot : c.order) placed[slot] = true;
  for (int slot = 0; slot < static_cast<int>(before.size()); ++slot)
    if (!placed[slot]) c.order.push_back(slot);
}

// For each place of `now`, the place of the same slot in `then`; empty where they are the same.
std::vector<int> moves(const std::vector<int>& now, const std::vector<int>& then) {
  if (now == then) return {};
  std::vector<int> place(then.size()), move(now.size());
  for (std::size_t i = 0; i < then.size(); ++i) place[then[i]] = static_cast<int>(i);
  for (std::size_t i = 0; i < now.size(); ++i) move[i] = place[now[i]];
  return move;
}

std::uint16_t to_bf16(float v) {
  const auto bits = std::bit_cast<std::uint32_t>(v);
  if (v != v) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Which earlier row of cond each row repeats (itself if none): index of the distinct row, and the
// rows that are distinct, in order of first appearance.
struct Distinct {
  std::vector<std::int64_t> index, first;
};
Distinct find_distinct(const std::byte* cond, std::int64_t rows, std::size_t row_bytes) {
  Distinct d;
  d.index.resize(rows);
  std::unordered_multimap<std::uint64_t, std::int64_t> seen;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::byte* row = cond + r * row_bytes;
    // Mostly the row before is the same one.
    if (r > 0 && std::memcmp(row, row - row_bytes, row_bytes) == 0) {
      d.index[r] = d.index[r - 1];
      continue;
    }
    std::uint64_t hash = 1469598103934665603u;
    for (std::size_t i = 0; i + 4 <= row_bytes; i += 4) {
      std::uint32_t word;
      std::memcpy(&word, row + i, 4);
      hash = (hash ^ word) * 1099511628211u;
    }
    std::int64_t found = -1;
    for (auto [it, end] = seen.equal_range(hash); it != end; ++it)
      if (std::memcmp(row, cond + d.first[it->second] * row_bytes, row_bytes) == 0)
        found = it->second;
    if (found < 0) {
      found = static_cast<std::int64_t>(d.first.size());
      d.first.push_back(r);
      seen.emplace(hash, found);
    }
    d.index[r] = found;
  }
  return d;
}

// Hoisted sums of at most this many bytes are held at a time.
constexpr std::int64_t kHoistBytes = std::int64_t(64) << 20;

// Up to this many rows are shared: more are split, which needs no barriers.
constexpr std::int64_t kSharedRows = 12;
constexpr std::int64_t kSharedBytes = std::int64_t(1)
                                      << 20;  // of weights, below which it does not pay

void run_shared_rows(const Call& call, const RowsJob& job, std::int64_t begin, std::int64_t end) {
  const Flow& flow = *call.flow;
  std::ptrdiff_t inner = 0, output = 0, chunks = 1;
  for (const Coupling& c : flow.couplings) {
    const Layer& last = c.layers.back();
    output = std::max<std::ptrdiff_t>(output, last.out_padded());
    if (c.layers.size() > 1)
      chunks = std::max<std::ptrdiff_t>(chunks, (last.in_padded + last.chunk - 1) / last.chunk);
    for (std::size_t l = 0; l + 2 < c.layers.size(); ++l)
      inner = std::max<std::ptrdiff_t>(inner, c.layers[l].out_padded());
  }
  const std::size_t in = element_size(flow.element), number = state_size(flow.element);
  const std::int64_t inner_bytes =
      round_up((end - begin) * padded_stride(inner, in) * static_cast<std::int64_t>(in), kAlign);
  const std::int64_t partial_bytes = round_up(
      chunks * (end - begin) * padded_stride(output, number) * static_cast<std::int64_t>(number),
      kAlign);
  std::vector<std::byte> memory(2 * (inner_bytes + partial_bytes));
  Barrier barrier;
  std::atomic<bool> failed{false};
  const auto rows = coupling_kernels().rows[static_cast<int>(flow.element)];
  parallel_team(call.threads, [&](int index, int size) {
    std::byte* at = memory.data();
    const Share share{index,
                      size,
                      &barrier,
                      &failed,
                      {at, at + inner_bytes},
                      {at + 2 * inner_bytes, at + 2 * inner_bytes + partial_bytes}};
    rows(job, begin, end, &share);
  });
}

// Threads take rows from a common store, large parts first: a thread that shares its core with
// something else (often a spinning OpenMP worker) then takes less, and none waits long at the end.
// Weights that no cache holds are read once per part, so such flows get as few parts as can be.
void run_rows(const Call& call, const RowsJob& job, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kMost = 480, kCachedBytes = std::int64_t(16) << 20;
  const auto rows = coupling_kernels().rows[static_cast<int>(call.flow->element)];
  const std::int64_t count = end - begin;
  if (call.threads > 1 && count <= kSharedRows && call.flow->packed_bytes >= kSharedBytes)
    return run_shared_rows(call, job, begin, end);
  const int shards = static_cast<int>(std::clamp<std::int64_t>(count / 4, 1, call.threads));
  const std::int64_t least = std::min<std::int64_t>(24, round_up((count + shards - 1) / shards, 4));
  const std::int64_t rounds = (count + kMost * shards - 1) / (kMost * shards);
  const std::int64_t even = (count + rounds * shards - 1) / (rounds * shards);
  const bool cached = call.flow->packed_bytes <= kCachedBytes;
  std::atomic<std::int64_t> next{0};
  parallel(shards, [&](int, int) {
    std::int64_t first = next.load(std::memory_order_relaxed), size;
    for (;;) {
      if (first >= count) return;
      const std::int64_t left = count - first;
      size = cached ? std::clamp(round_up(left / (2 * shards), least), least, kMost) : even;
      size = std::min(shards == 1 ? left : size, left);
      if (!next.compare_exchange_weak(first, first + size, std::memory_order_relaxed)) continue;
      rows(job, begin + first, begin + first + size, nullptr);
      first = next.load(std::memory_order_relaxed);
    }
  });
}

void hoist(const Call& call, const void* cond, std::int64_t images, void* hoisted) {
  const Flow& flow = *call.flow;
  std::int64_t units = 0;
  for (const Coupling& c : flow.couplings)
    if (c.cond_padded > 0) units += c.layers[0].blocks;
  const auto kernel = coupling_kernels().hoist[static_cast<int>(flow.element)];
  parallel(call.threads, [&](int shard, int n) {
    const Range r = shard_range(units, shard, n);
    kernel(flow, call.packed, cond, images, r.begin, r.end, hoisted);
  });
}

}  // namespace

int lanes(Element element) { return coupling_kernels().lanes[static_cast<int>(element)]; }
bool supports(Element element) { return lanes(element) > 0; }

Flow parse_plan(std::span<const std::int64_t> plan) {
  Reader in(plan);
  Flow flow;
  flow.dim = in.integer("dim", 1, kMaxWidth);
  flow.cond_dim = in.integer("cond_dim", 0, kMaxWidth);
  flow.element = static_cast<Element>(in.integer("element", 0, 2));
  flow.lanes = in.integer("lanes", 1, 64);
  const int couplings = in.integer("number of couplings", 0, 1 << 16);
  const std::vector<int> output_index = in.slots("output index", flow.dim, flow.dim);
  if (!distinct(output_index))
    throw std::invalid_argument("flow plan: output index is no permutation");
  std::vector<int> identity(flow.dim);
  std::iota(identity.begin(), identity.end(), 0);
  const int step = flow.element == Element::bf16 ? 2 : 1;
  const auto bytes = static_cast<std::int64_t>(element_size(flow.element));
  std::int64_t offset = 0, hoisted = 0;
  for (int i = 0; i < couplings; ++i) {
    Coupling c;
    c.active = in.integer("active count", 1, flow.dim);
    c.passive = in.integer("passive count", 0, flow.dim);
    const bool reads_cond = in.integer("reads condition", 0, 1) != 0;
    const int layers = in.integer("layers", 1, 64);
    c.activation = static_cast<Activation>(in.integer("activation", 0, 5));
    c.clamp_activation = static_cast<Clamp>(in.integer("clamp activation", 0, 5));
    c.negative_slope = in.real();
    c.clamp = in.real();
    const std::vector<int> active = in.slots("active slot", c.active, flow.dim);
    const std::vector<int> passive = in.slots("passive slot", c.passive, flow.dim);
    std::vector<int> both = active;
    both.insert(both.end(), passive.begin(), passive.end());
    if (!distinct(both)) throw std::invalid_argument("flow plan: active and passive slots overlap");
    choose_order(c, active, passive, i > 0 ? flow.couplings.back().order : identity);
    c.cond_padded = reads_cond ? static_cast<int>(round_up(flow.cond_dim, step)) : 0;
    c.hoisted = hoisted;
    int width = c.passive, width_padded = static_cast<int>(round_up(width, step)), chunk = kChunk;
    for (int l = 0; l < layers; ++l) {
      Layer layer;
      layer.in = width;
      layer.in_padded = width_padded;
      layer.chunk = chunk;
      layer.out = in.integer("layer outputs", 1, kMaxWidth);
      layer.vectors = choose_vectors((layer.out + flow.lanes - 1) / flow.lanes);
      layer.block = layer.vectors * flow.lanes;
      layer.blocks = (layer.out + layer.block - 1) / layer.block;
      layer.weight = offset;
      const std::int64_t inputs = layer.in_padded + (l == 0 ? c.cond_padded : 0);
      offset = round_up(offset + inputs * layer.out_padded() * bytes, kAlign);
      layer.bias = offset;
      offset = round_up(
          offset + layer.out_padded() * static_cast<std::int64_t>(state_size(flow.element)),
          kAlign);
      width = layer.out;
      width_padded = layer.out_padded();
      // The next layer sums over whole blocks of this one.
      chunk = std::max(kChunk / layer.block, 1) * layer.block;
      c.layers.push_back(layer);
    }
    if (width != 2 * c.active)
      throw std::invalid_argument("flow plan: the last layer must have 2 * active outputs");
    if (c.cond_padded > 0) hoisted += c.layers[0].out_padded();
    flow.couplings.push_back(std::move(c));
  }
  if (!in.done()) throw std::invalid_argument("flow plan: too long");
  for (std::size_t i = 0; i + 1 < flow.couplings.size(); ++i) {
    Coupling &a = flow.couplings[i], &b = flow.couplings[i + 1];
    b.from_before = moves(b.order, a.order);
    a.from_after = moves(a.order, b.order);
  }
  flow.first_slot = couplings > 0 ? flow.couplings.front().order : identity;
  std::vector<int> latent(flow.dim);  // of a slot
  for (int k = 0; k < flow.dim; ++k) latent[output_index[k]] = k;
  for (const int slot : couplings > 0 ? flow.couplings.back().order : identity)
    flow.last_latent.push_back(latent[slot]);
  flow.packed_bytes = std::max(offset, kAlign);
  flow.hoisted_width = hoisted;
  return flow;
}

template <class T>
void pack_layer(const Flow& flow, int coupling, int layer, const T* weight, const T* bias,
                std::span<const std::int64_t> cond_columns, std::byte* packed) {
  if (coupling < 0 || coupling >= static_cast<int>(flow.couplings.size()))
    throw std::invalid_argument("pack: no such coupling");
  const Coupling& c = flow.couplings[coupling];
  if (layer < 0 || layer >= static_cast<int>(c.layers.size()))
    throw std::invalid_argument("pack: no such layer");
  const Layer& l = c.layers[layer];
  const int cond = layer == 0 ? c.cond_padded : 0;
  // Stored input -> column of the given weight; -1: a zero.
  std::vector<std::int64_t> column(cond + l.in_padded, -1);
  for (std::size_t i = 0; i < cond_columns.size(); ++i) {
    const std::int64_t at = cond_columns[i];
    if (layer != 0 || at < 0 || at >= flow.cond_dim || at >= cond)
      throw std::invalid_argument("pack: condition column out of range");
    column[at] = l.in + static_cast<std::int64_t>(i);
  }
  for (int i = 0; i < l.in; ++i) column[cond + i] = i;
  const std::int64_t given = l.in + static_cast<std::int64_t>(cond_columns.size());
  const std::int64_t inputs = cond + l.in_padded;
  const int pair = flow.element == Element::bf16 ? 2 : 1;
  for (int o = 0; o < l.out_padded(); ++o) {
    for (std::int64_t k = 0; k < inputs; ++k) {
      const T v = o < l.out && column[k] >= 0 ? weight[o * given + column[k]] : T(0);
      const std::int64_t at =
          (o / l.block * inputs + k / pair * pair) * l.block + o % l.block * pair + k % pair;
      std::byte* base = packed + l.weight;
      if (flow.element == Element::bf16) {
        reinterpret_cast<std::uint16_t*>(base)[at] = to_bf16(static_cast<float>(v));
      } else {
        reinterpret_cast<T*>(base)[at] = v;
      }
    }
    reinterpret_cast<T*>(packed + l.bias)[o] = o < l.out && bias ? bias[o] : T(0);
  }
}
template void pack_layer<float>(const Flow&, int, int, const float*, const float*,
                                std::span<const std::int64_t>, std::byte*);
template void pack_layer<double>(const Flow&, int, int, const double*, const double*,
                                 std::span<const std::int64_t>, std::byte*);

void run(const Call& call) {
  const Flow& flow = *call.flow;
  if (flow.lanes != lanes(flow.element))
    throw std::invalid_argument("flow: packed for another SIMD level than the one in use");
  const std::int64_t rows = call.images * call.per_image;
  if (rows == 0) return;
  const std::size_t number = state_size(flow.element);
  RowsJob job{&call, nullptr, nullptr, 0};
  if (flow.hoisted_width == 0) return run_rows(call, job, 0, rows);

  const std::size_t cond_row = flow.cond_dim * number;
  const auto* cond = static_cast<const std::byte*>(call.cond);
  const std::int64_t image_limit = std::max<std::int64_t>(
      1, kHoistBytes / (flow.hoisted_width * static_cast<std::int64_t>(number)));

  if (call.per_image == 1 && rows > 1) {
    // Callers that know nothing of images repeat the condition for every hypothesis.
    const Distinct d = find_distinct(cond, rows, cond_row);
    const auto images = static_cast<std::int64_t>(d.first.size());
    if (images > image_limit || images * 4 > rows) return run_rows(call, job, 0, rows);
    std::vector<std::byte> distinct_cond(images * cond_row);
    for (std::int64_t i = 0; i < images; ++i)
      std::memcpy(distinct_cond.data() + i * cond_row, cond + d.first[i] * cond_row, cond_row);
    std::vector<double> hoisted((images * flow.hoisted_width * number + 7) / 8);
    hoist(call, distinct_cond.data(), images, hoisted.data());
    job.image_of = d.index.data();
    job.hoisted = hoisted.data();
    return run_rows(call, job, 0, rows);
  }

  std::vector<double> hoisted(
      (std::min(image_limit, call.images) * flow.hoisted_width * number + 7) / 8);
  job.hoisted = hoisted.data();
  for (std::int64_t first = 0; first < call.images; first += image_limit) {
    const std::int64_t images = std::min(image_limit, call.images - first);
    hoist(call, cond + first * cond_row, images, hoisted.data());
    job.hoisted_begin = first;
    run_rows(call, job, first * call.per_image, (first + images) * call.per_image);
  }
}

template <class T>
void affine(T* state, std::int64_t rows, int dim, const T* raw,
            std::span<const std::int64_t> active, double clamp, Clamp clamp_activation,
            bool inverse, T* log_det, int threads) {
  const auto count = static_cast<int>(active.size());
  for (const std::int64_t a : active)
    if (a < 0 || a >= dim) throw std::invalid_argument("affine: active slot out of range");
  const int shards = static_cast<int>(std::clamp<std::int64_t>(rows * count / 8192, 1, threads));
  parallel(shards, [&](int shard, int n) {
    const Range r = shard_range(rows, shard, n);
    T *s = state + r.begin * dim, *l = log_det + r.begin;
    const T* u = raw + r.begin * 2 * count;
    if constexpr (sizeof(T) == 8)
      coupling_kernels().affine_f64(s, r.end - r.begin, dim, u, active.data(), count, clamp,
                                    clamp_activation, inverse, l);
    else
      coupling_kernels().affine_f32(s, r.end - r.begin, dim, u, active.data(), count, clamp,
                                    clamp_activation, inverse, l);
  });
}
template void affine<float>(float*, std::int64_t, int, const float*, std::span<const std::int64_t>,
                            double, Clamp, bool, float*, int);
template void affine<double>(double*, std::int64_t, int, const double*,
                             std::span<const std::int64_t>, double, Clamp, bool, double*, int);

}  // namespace coupling
}  // namespace fasthyp
