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
#include "coupling/plan.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(coupling::Kernels, coupling_kernels)

namespace coupling {
namespace {

constexpr std::int64_t kAlign = 64;

std::size_t element_size(Element e) { return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2; }
std::size_t state_size(Element e) { return e == Element::f64 ? 8 : 4; }

// The first place at which `part` stands in `whole` as one piece; -1: nowhere.
int find(const std::vector<int>& whole, const std::vector<int>& part) {
  const auto at = std::search(whole.begin(), whole.end(), part.begin(), part.end());
  return at == whole.end() && !part.empty() ? -1 : static_cast<int>(at - whole.begin());
}

// An order for a coupling; keeps that of the coupling before if it will do.
std::vector<int> choose_order(Coupling& c, const std::vector<int>& active,
                              const std::vector<int>& passive, const std::vector<int>& before) {
  c.active_at = find(before, active);
  c.passive_at = find(before, passive);
  if (c.active_at >= 0 && c.passive_at >= 0) return before;
  std::vector<int> order = active;
  order.insert(order.end(), passive.begin(), passive.end());
  c.active_at = 0;
  c.passive_at = static_cast<int>(active.size());
  std::vector<bool> placed(before.size(), false);
  for (const int slot : order) placed[slot] = true;
  for (int slot = 0; slot < static_cast<int>(before.size()); ++slot)
    if (!placed[slot]) order.push_back(slot);
  return order;
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

// Reads a plan, and gives every matrix its place in the packed buffer.
class PlanParser {
 public:
  explicit PlanParser(std::span<const std::int64_t> plan) : in_(plan) {}

  Flow flow() {
    flow_.dim = in_.integer("dim", 1, kMaxWidth);
    flow_.cond_dim = in_.integer("cond_dim", 0, kMaxWidth);
    flow_.element = static_cast<Element>(in_.integer("element", 0, 2));
    flow_.lanes = in_.integer("lanes", 1, 64);
    const int steps = in_.integer("number of steps", 0, 1 << 16);
    const std::vector<int> output_index = in_.slots("output index", flow_.dim, flow_.dim);
    if (!distinct(output_index))
      throw std::invalid_argument("flow plan: output index is no permutation");
    std::vector<int> order(flow_.dim);  // of the last coupling
    std::iota(order.begin(), order.end(), 0);
    for (int i = 0; i < steps; ++i) {
      Step step;
      if (in_.flag("step type")) {
        step.what = linear();
      } else {
        step.what = coupling(order);
        step.before = step.after = order;
      }
      flow_.steps.push_back(std::move(step));
    }
    if (!in_.done()) throw std::invalid_argument("flow plan: too long");
    place_linear_steps();
    for (std::size_t i = 0; i + 1 < flow_.steps.size(); ++i) {
      Step &a = flow_.steps[i], &b = flow_.steps[i + 1];
      b.from_before = moves(b.before, a.after);
      a.from_after = moves(a.after, b.before);
    }
    std::vector<int> latent(flow_.dim);  // of a slot
    for (int k = 0; k < flow_.dim; ++k) latent[output_index[k]] = k;
    if (steps > 0) order = flow_.steps.back().after;
    flow_.first_slot = steps > 0 ? flow_.steps.front().before : order;
    for (const int slot : order) flow_.last_latent.push_back(latent[slot]);
    flow_.packed_bytes = std::max(offset_, kAlign);
    return std::move(flow_);
  }

 private:
  // `order`: of the coupling before, then of this one.
  Coupling coupling(std::vector<int>& order) {
    Coupling c;
    c.active = in_.integer("active count", 1, flow_.dim);
    c.passive = in_.integer("passive count", 0, flow_.dim);
    c.kind = static_cast<Kind>(in_.integer("kind", 0, 2));
    c.clamp_activation = static_cast<Clamp>(in_.integer("clamp activation", 0, 5));
    c.clamp = in_.real();
    const int nets = in_.integer("nets", 1, c.kind == Kind::additive ? 1 : 2);
    const std::vector<int> active = in_.slots("active slot", c.active, flow_.dim);
    const std::vector<int> passive = in_.slots("passive slot", c.passive, flow_.dim);
    std::vector<int> both = active;
    both.insert(both.end(), passive.begin(), passive.end());
    if (!distinct(both)) throw std::invalid_argument("flow plan: active and passive slots overlap");
    order = choose_order(c, active, passive, order);
    const int outputs = c.kind != Kind::additive && nets == 1 ? 2 * c.active : c.active;
    int raw = 0;
    for (int i = 0; i < nets; ++i) {
      c.nets.push_back(net(c.passive, outputs));
      c.nets.back().raw_at = raw;
      raw += c.nets.back().layers.back().matrix.out_padded();
    }
    widen(flow_.widths.output, raw);
    c.shift_at = nets == 2 ? c.nets[1].raw_at : c.kind == Kind::additive ? 0 : c.active;
    return c;
  }

  Net net(int width, int outputs) {
    Net n;
    const int layers = in_.integer("layers", 1, 64);
    n.activation = static_cast<Activation>(in_.integer("activation", 0, 5));
    n.negative_slope = in_.real();
    int width_padded = static_cast<int>(round_up(width, pair())), chunk = kChunk, kept = 0;
    for (int l = 0; l < layers; ++l) {
      Dense d;
      const int out = in_.integer("layer outputs", 1, kMaxWidth);
      const bool reads_cond = condition("reads condition", l == 0);
      d.matrix = matrix(flow_.element, width, width_padded, out, chunk, reads_cond);
      if (condition("gate", true)) d.gate = matrix(flow_.element, 0, 0, out, kChunk, true);
      if (d.gate) widen(flow_.widths.input, d.gate->cond_padded);
      flow_.gated |= d.gate.has_value();
      d.add = in_.flag("add");
      d.keep = in_.flag("keep");
      if (d.add && kept != out)
        throw std::invalid_argument("flow plan: a layer adds " + std::to_string(kept) +
                                    " numbers to its " + std::to_string(out));
      if (d.keep) kept = out;
      d.norm = in_.flag("norm") ? take(2 * d.matrix.out_padded(), state_size(flow_.element)) : -1;
      d.activate = in_.flag("activate");
      if (l == 0) widen(flow_.widths.input, d.matrix.cond_padded + width_padded);
      if (l > 0) widen(flow_.widths.chunk, chunk);
      if (l > 0 && l + 1 == layers) widen(flow_.widths.chunks, (width_padded + chunk - 1) / chunk);
      if (l + 2 < layers) widen(flow_.widths.inner, d.matrix.out_padded());
      if (d.keep || d.add) widen(flow_.widths.kept, d.matrix.out_padded());
      width = out;
      width_padded = d.matrix.out_padded();
      // The next layer sums over whole blocks of this one.
      chunk = std::max(kChunk / d.matrix.block, 1) * d.matrix.block;
      n.layers.push_back(d);
    }
    if (width != outputs)
      throw std::invalid_argument("flow plan: the last layer must have " + std::to_string(outputs) +
                                  " outputs");
    return n;
  }

  Linear linear() {
    Linear l;
    const Element state = flow_.element == Element::f64 ? Element::f64 : Element::f32;
    l.diagonal = in_.flag("diagonal");
    const int in = l.diagonal ? 1 : flow_.dim;
    for (Matrix* m : {&l.forward, &l.inverse}) *m = matrix(state, in, in, flow_.dim, kChunk, false);
    widen(flow_.widths.output, l.forward.out_padded());
    flow_.log_det += in_.real();
    return l;
  }

  Matrix matrix(Element element, int in, int in_padded, int out, int chunk, bool reads_cond) {
    Matrix m;
    m.element = element;
    m.in = in;
    m.out = out;
    m.cond_padded = reads_cond ? static_cast<int>(round_up(flow_.cond_dim, pair())) : 0;
    m.in_padded = in_padded;
    m.chunk = chunk;
    m.vectors = choose_vectors((out + flow_.lanes - 1) / flow_.lanes);
    m.block = m.vectors * flow_.lanes;
    m.blocks = (out + m.block - 1) / m.block;
    m.weight =
        take(std::int64_t(m.cond_padded + in_padded) * m.out_padded(), element_size(element));
    m.bias = take(m.out_padded(), state_size(element));
    m.hoisted = flow_.hoisted_width;
    if (reads_cond) flow_.hoisted_width += m.out_padded();
    widen(flow_.widths.block, m.block);
    return m;
  }

  // A dense step takes the state from the order of the step before to that of the next coupling;
  // the first step has what order it likes.
  void place_linear_steps() {
    const auto next_coupling = [&](std::size_t i) {
      for (; i < flow_.steps.size(); ++i)
        if (std::holds_alternative<Coupling>(flow_.steps[i].what)) return flow_.steps[i].before;
      std::vector<int> slots(flow_.dim);
      std::iota(slots.begin(), slots.end(), 0);
      return slots;
    };
    for (std::size_t i = 0; i < flow_.steps.size(); ++i) {
      Step& step = flow_.steps[i];
      const auto* l = std::get_if<Linear>(&step.what);
      if (!l) continue;
      step.before = i > 0 ? flow_.steps[i - 1].after : next_coupling(i);
      step.after = l->diagonal ? step.before : next_coupling(i);
    }
  }

  bool condition(const char* what, bool allowed) {
    return in_.integer(what, 0, allowed && flow_.cond_dim > 0 ? 1 : 0) != 0;
  }
  int pair() const { return flow_.element == Element::bf16 ? 2 : 1; }
  std::int64_t take(std::int64_t numbers, std::size_t size) {
    const std::int64_t at = offset_;
    offset_ = round_up(offset_ + numbers * static_cast<std::int64_t>(size), kAlign);
    return at;
  }
  static void widen(int& width, int needed) { width = std::max(width, needed); }

  PlanReader in_;
  Flow flow_{};
  std::int64_t offset_ = 0;
};

// Copies tensors to where the kernels read them; T is the state's type.
template <class T>
class Packer {
 public:
  Packer(const Flow& flow, std::span<const Numbers> tensors, std::byte* packed)
      : flow_(flow), tensors_(tensors), packed_(packed) {}

  void run(int threads) {
    for (const Step& step : flow_.steps) {
      if (const auto* c = std::get_if<Coupling>(&step.what)) {
        for (const Net& net : c->nets)
          for (const Dense& layer : net.layers) dense(layer);
      } else {
        const auto& l = std::get<Linear>(step.what);
        linear(l.forward, l.diagonal, step.before, step.after);
        linear(l.inverse, l.diagonal, step.after, step.before);
      }
    }
    if (!tensors_.empty())
      throw std::invalid_argument("pack: " + std::to_string(tensors_.size()) +
                                  " tensors more than the plan has");
    if (threads == 1 || blocks_.size() < 32) {
      for (const Block& b : blocks_) copy(b);
      return;
    }
    parallel(threads, [&](int shard, int shards) {
      const Range mine = shard_range(static_cast<std::int64_t>(blocks_.size()), shard, shards);
      for (std::int64_t i = mine.begin; i < mine.end; ++i) copy(blocks_[i]);
    });
  }

 private:
  // A block of outputs of a weight (out, given): its stored inputs [first, first + count), of which
  // the last may be padding.
  struct Block {
    const Matrix* matrix;
    const T* weight;
    int first, count, given, block;
  };

  void dense(const Dense& d) {
    inputs(d.matrix, d.matrix.cond_padded, d.matrix.in_padded, d.matrix.in);
    if (d.matrix.cond_padded > 0) inputs(d.matrix, 0, d.matrix.cond_padded, flow_.cond_dim);
    vector(d.matrix, d.matrix.bias);
    if (d.gate) {
      inputs(*d.gate, 0, d.gate->cond_padded, flow_.cond_dim);
      vector(*d.gate, d.gate->bias);
    }
    if (d.norm >= 0) {
      vector(d.matrix, d.norm);
      vector(d.matrix, d.norm + d.matrix.out_padded() * static_cast<std::int64_t>(sizeof(T)));
    }
  }

  // The places before and after stand for slots of the given matrix and vector.
  void linear(const Matrix& m, bool diagonal, const std::vector<int>& before,
              const std::vector<int>& after) {
    const T* weight = take(std::int64_t(m.in) * m.out);
    const T* shift = take(m.out);
    for (int b = 0; b < m.blocks; ++b)
      fill(m, b, 0, m.in, [&](int o, int k) {
        return diagonal ? weight[after[o]] : weight[std::int64_t(after[o]) * m.in + before[k]];
      });
    T* bias = reinterpret_cast<T*>(packed_ + m.bias);
    for (int o = 0; o < m.out_padded(); ++o) bias[o] = o < m.out ? shift[after[o]] : T(0);
  }

  void inputs(const Matrix& m, int first, int count, int given) {
    const T* weight = take(std::int64_t(given) * m.out);
    for (int b = 0; b < m.blocks; ++b) blocks_.push_back({&m, weight, first, count, given, b});
  }

  void copy(const Block& b) {
    fill(*b.matrix, b.block, b.first, b.count, [&](int o, int k) {
      return k < b.given ? b.weight[std::int64_t(o) * b.given + k] : T(0);
    });
  }

  void vector(const Matrix& m, std::int64_t at) {
    T* to = reinterpret_cast<T*>(packed_ + at);
    std::fill(std::copy_n(take(m.out), m.out, to), to + m.out_padded(), T(0));
  }

  // Stored inputs [first, first + count) of the outputs o of block b: value(o, input - first).
  template <class F>
  void fill(const Matrix& m, int b, int first, int count, F&& value) {
    if (m.element == Element::bf16)
      fill<2>(m, b, first, count, reinterpret_cast<std::uint16_t*>(packed_ + m.weight),
              [&](int o, int k) { return to_bf16(static_cast<float>(value(o, k))); });
    else
      fill<1>(m, b, first, count, reinterpret_cast<T*>(packed_ + m.weight), value);
  }
  // kPair inputs of an output stand together.
  template <int kPair, class Number, class F>
  void fill(const Matrix& m, int b, int first, int count, Number* packed, F&& value) {
    constexpr int kFew = 16;  // what these are read from and written to stays in the cache
    packed += std::int64_t(b) * (m.cond_padded + m.in_padded) * m.block;
    const int outputs = std::min(m.block, m.out - b * m.block);
    for (int few = 0; few < count; few += kFew) {
      const int end = std::min(few + kFew, count);
      for (int i = 0; i < m.block; ++i)
        for (int k = few; k < end; ++k) {
          const int line = (first + k) / kPair * kPair;
          packed[std::int64_t(line) * m.block + i * kPair + (first + k) % kPair] =
              i < outputs ? value(b * m.block + i, k) : Number(0);
        }
    }
  }

  const T* take(std::int64_t count) {
    if (tensors_.empty()) throw std::invalid_argument("pack: the plan has more tensors");
    const Numbers next = tensors_.front();
    if (next.count != count)
      throw std::invalid_argument("pack: expected a tensor of " + std::to_string(count) +
                                  " numbers, got " + std::to_string(next.count));
    tensors_ = tensors_.subspan(1);
    return static_cast<const T*>(next.data);
  }

  const Flow& flow_;
  std::span<const Numbers> tensors_;
  std::byte* packed_;
  std::vector<Block> blocks_;
};

// Hoisted sums of at most this many bytes are held at a time.
constexpr std::int64_t kHoistBytes = std::int64_t(64) << 20;

// Up to this many rows are shared: more are split, which needs no barriers.
constexpr std::int64_t kSharedRows = 12;
constexpr std::int64_t kSharedBytes = std::int64_t(1)
                                      << 20;  // of weights, below which it does not pay

void run_shared_rows(const Call& call, const RowsJob& job, std::int64_t begin, std::int64_t end) {
  const Flow& flow = *call.flow;
  const std::int64_t rows = end - begin;
  const std::size_t in = element_size(flow.element), number = state_size(flow.element);
  const auto bytes = [&](std::int64_t count, int width, std::size_t size) {
    return round_up(count * padded_stride(width, size) * static_cast<std::int64_t>(size), kAlign);
  };
  const std::int64_t inner = bytes(rows, flow.widths.inner, in);
  const std::int64_t kept = bytes(rows, flow.widths.kept, number);
  const std::int64_t partial = bytes(flow.widths.chunks * rows, flow.widths.output, number);
  std::vector<std::byte> memory(2 * inner + kept + 2 * partial);
  Barrier barrier;
  std::atomic<bool> failed{false};
  const auto run = coupling_kernels().rows[static_cast<int>(flow.element)];
  parallel_team(call.threads, [&](int index, int size) {
    std::byte* at = memory.data();
    std::byte* sums = at + 2 * inner + kept;
    const Share share{
        index, size, &barrier, &failed, {at, at + inner}, at + 2 * inner, {sums, sums + partial}};
    run(job, begin, end, &share);
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
  for_each_hoisted(flow, [&](const Matrix& m, bool) { units += m.blocks; });
  const auto kernel = coupling_kernels().hoist[static_cast<int>(flow.element)];
  parallel(call.threads, [&](int shard, int n) {
    const Range r = shard_range(units, shard, n);
    kernel(flow, call.packed, cond, images, r.begin, r.end, hoisted);
  });
}

}  // namespace

int choose_vectors(int vectors) {
  if (vectors == 1) return 1;
  const int two = static_cast<int>(round_up(vectors, 2)),
            three = static_cast<int>(round_up(vectors, 3));
  return three < two ? 3 : 2;
}

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

int lanes(Element element) { return coupling_kernels().lanes[static_cast<int>(element)]; }
bool supports(Element element) { return lanes(element) > 0; }

Flow parse_plan(std::span<const std::int64_t> plan) { return PlanParser(plan).flow(); }

void pack(const Flow& flow, std::span<const Numbers> tensors, std::byte* packed, int threads) {
  if (flow.element == Element::f64)
    Packer<double>(flow, tensors, packed).run(threads);
  else
    Packer<float>(flow, tensors, packed).run(threads);
}

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
    if (images <= image_limit && images * 4 <= rows) {
      std::vector<std::byte> distinct_cond(images * cond_row);
      for (std::int64_t i = 0; i < images; ++i)
        std::memcpy(distinct_cond.data() + i * cond_row, cond + d.first[i] * cond_row, cond_row);
      std::vector<double> hoisted((images * flow.hoisted_width * number + 7) / 8);
      hoist(call, distinct_cond.data(), images, hoisted.data());
      job.image_of = d.index.data();
      job.hoisted = hoisted.data();
      return run_rows(call, job, 0, rows);
    }
    if (!flow.gated) return run_rows(call, job, 0, rows);  // gates are hoisted always
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
