#include "cuda_runtime.h"

#include <link.h>
#include <sanitizer/common_interface_defs.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// --- a stack to run on, and how to change over to another ---

#if defined(__x86_64__)

// swapcontext asks the kernel for the signal mask each time; this is some forty times as fast.
extern "C" void simt_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

namespace {
struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, std::size_t size, void (*entry)()) {
    // six registers, the address that simt_switch returns to, and none that entry returns to
    void** top = reinterpret_cast<void**>(stack + size) - 8;
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer = top;
  }
  void change_to(const Context& other) { simt_switch(&stack_pointer, other.stack_pointer); }
};
}  // namespace

#else

namespace {
struct Context {
  ucontext_t context;

  void prepare(char* stack, std::size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void change_to(const Context& other) { swapcontext(&context, &other.context); }
};
}  // namespace

#endif

namespace fasthyp::simt {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr int kSharedDefault = 48 * 1024;
constexpr int kThreadLimit = 1024, kClusterLimit = 8, kBarriers = 16, kWarp = 32;

// A property of the device, which the environment may set.
int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}
int most_shared() { return setting("SIMT_SHARED", 227 * 1024); }

enum class State { ready, at_barrier, at_cluster_barrier, in_exchange, done };

struct AsyncCopy {
  void* to;
  std::size_t size;
  std::array<char, 16> data;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::done;
  dim3 thread;
  int index = 0;               // in its block
  int block = 0;               // in its cluster
  int barrier = 0, votes = 0;  // where it waits; the outcome of the vote there
  bool vote = false;
  unsigned mask = 0;  // of the exchange it waits in, and what it brought
  void* mine = nullptr;
  Complete complete = nullptr;
  std::deque<std::vector<AsyncCopy>> copies{1};  // groups; the last one is open
};

struct Barrier {
  int arrived = 0, threads = 0;
};

std::mt19937_64 random;
std::map<const void*, int> shared_limits;
std::deque<Fiber> fibers;  // block after block; more than a cluster has, after a larger one
int threads = 0;           // of a block
int cluster = 1;           // blocks that run together
Fiber* current = nullptr;

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{128}); }
};

struct Block {
  dim3 index;
  int ended = 0;
  Barrier barriers[kBarriers];
  std::unique_ptr<char[], AlignedDelete> shared;
};
std::vector<Block> blocks;
std::size_t shared_size = 0;
int at_cluster_barrier = 0;

Block& own_block() { return blocks[current->block]; }
Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;

// The variables that are __shared__: what the program has of thread-local ones.
struct Variables {
  char *begin = nullptr, *end = nullptr;
} variables;

Variables find_variables() {
  Variables found;
  const auto look = [](dl_phdr_info* info, std::size_t, void* out) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
      const auto begin = static_cast<char*>(info->dlpi_tls_data);
      *static_cast<Variables*>(out) = {begin, begin + info->dlpi_phdr[i].p_memsz};
    }
    return 1;  // the program itself comes first; its libraries are of no interest
  };
  dl_iterate_phdr(look, &found);
  return found;
}

void fill_with_noise(char* begin, char* end) {
  std::uint64_t noise = 0;
  for (char* p = begin; p != end; ++p, noise >>= 8) {
    if ((p - begin) % 8 == 0) noise = random();
    *p = static_cast<char>(noise);
  }
}

bool is_shared(const void* address) {
  const char* p = static_cast<const char*>(address);
  const char* own = own_block().shared.get();
  return (p >= own && p < own + shared_size) || (p >= variables.begin && p < variables.end);
}

void check_row(const void* address, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) fail(what);
}

void to_scheduler() {
  Fiber& self = *current;
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_size);
  self.context.change_to(scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void end_barrier(int block, int id) {
  int votes = 0;
  const auto each = [&](const auto& f) {
    for (int i = block * threads; i < (block + 1) * threads; ++i)
      if (fibers[i].state == State::at_barrier && fibers[i].barrier == id) f(fibers[i]);
  };
  each([&](const Fiber& f) { votes += f.vote; });
  each([&](Fiber& f) {
    f.votes = votes;
    f.state = State::ready;
  });
  blocks[block].barriers[id].arrived = 0;
}

// A fiber runs one thread of each block in turn.
void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body)();
    current->state = State::done;
    Block& own = own_block();
    ++own.ended;
    if (own.barriers[0].arrived > 0 && own.barriers[0].arrived + own.ended == threads)
      end_barrier(current->block, 0);
    to_scheduler();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = own_block().index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  scheduler.change_to(fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

[[noreturn]] void deadlock() {
  for (int block = 0; block < cluster; ++block) {
    const Block& b = blocks[block];
    int at[kBarriers] = {}, in_exchange = 0, in_cluster = 0;
    for (int i = block * threads; i < (block + 1) * threads; ++i) {
      at[fibers[i].barrier] += fibers[i].state == State::at_barrier;
      in_exchange += fibers[i].state == State::in_exchange;
      in_cluster += fibers[i].state == State::at_cluster_barrier;
    }
    std::fprintf(stderr, "simt: block (%u, %u, %u): %d threads have ended", b.index.x, b.index.y,
                 b.index.z, b.ended);
    if (in_exchange) std::fprintf(stderr, ", %d wait for lanes of their warp", in_exchange);
    if (in_cluster) std::fprintf(stderr, ", %d wait for their cluster", in_cluster);
    for (int id = 0; id < kBarriers; ++id)
      if (at[id]) std::fprintf(stderr, ", %d wait at barrier %d", at[id], id);
    std::fputs("\n", stderr);
  }
  fail("deadlock: threads wait at different places");
}

void run_cluster() {
  at_cluster_barrier = 0;
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    int ended = 0;
    for (int i = 0; i < threads * cluster; ++i) {
      if (fibers[i].state == State::ready) ready.push_back(i);
      ended += fibers[i].state == State::done;
    }
    if (ended == threads * cluster) return;
    if (ready.empty()) deadlock();
    // All that are ready now run once, in a drawn order.
    std::shuffle(ready.begin(), ready.end(), random);
    for (const int index : ready) resume(fibers[index]);
  }
}

// --- matrices in the registers of a warp ---

struct LoadLane {
  std::uint32_t* r;
  const void* row;
};

template <int kMatrices>
void load_matrices(void* const (&lanes)[32]) {
  for (int lane = 0; lane < kWarp; ++lane)
    if (!lanes[lane]) fail("ldmatrix by less than a warp");
  for (int m = 0; m < kMatrices; ++m) {
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LoadLane*>(lanes[8 * m + row])->row;
      check_row(address, "ldmatrix of a row that is not aligned to 16 bytes");
      if (!is_shared(address)) fail("ldmatrix of a row that is not in shared memory");
      for (int i = 0; i < 4; ++i)
        std::memcpy(&static_cast<LoadLane*>(lanes[4 * row + i])->r[m],
                    static_cast<const char*>(address) + 4 * i, 4);
    }
  }
}

struct ProductLane {
  float* c;
  const std::uint32_t *a, *b;
};

// A word of a or b as its elements.
struct Bf16 {
  static constexpr int kPerWord = 2;
  static float element(std::uint32_t word, int i) {
    return std::bit_cast<float>(i == 0 ? word << 16 : word & 0xffff0000u);
  }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static float element(std::uint32_t word, int) { return std::bit_cast<float>(word & ~0x1fffu); }
};

template <class Type>
__attribute__((no_sanitize("address", "undefined"))) void multiply(void* const (&lanes)[32]) {
  constexpr int kPer = Type::kPerWord, kDepth = 8 * kPer;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!lanes[lane]) fail("mma by less than a warp");
    const auto& from = *static_cast<const ProductLane*>(lanes[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kPer; ++i) {
        const int k = kPer * (4 * half + t) + i;
        a[group][k] = Type::element(from.a[2 * half], i);
        a[group + 8][k] = Type::element(from.a[2 * half + 1], i);
        b[k][group] = Type::element(from.b[half], i);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    double sum[8] = {};
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column)
        sum[column] += static_cast<double>(a[row][k]) * b[k][column];
    for (int column = 0; column < 8; ++column) {
      float& c =
          static_cast<ProductLane*>(lanes[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
      c = static_cast<float>(c + sum[column]);
    }
  }
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::_Exit(86);
}

int lane_index() { return current->index % kWarp; }
void* dynamic_shared() { return own_block().shared.get(); }
void set_seed(std::uint64_t seed) { random.seed(seed); }

int barrier(int id, int count, bool vote) {
  Fiber& self = *current;
  Barrier& here = own_block().barriers[id];
  if (here.arrived == 0) here.threads = count;
  if (here.threads != count) fail("threads wait at a barrier with different counts");
  self.barrier = id;
  self.vote = vote;
  self.state = State::at_barrier;
  ++here.arrived;
  if (here.arrived == (count ? count : threads - own_block().ended))
    end_barrier(self.block, id);
  else
    to_scheduler();
  return self.votes;
}

void meet(unsigned mask, void* mine, Complete complete) {
  Fiber& self = *current;
  if (!(mask >> lane_index() & 1)) fail("a lane that is not in its mask");
  self.mask = mask;
  self.mine = mine;
  self.complete = complete;
  self.state = State::in_exchange;
  void* lanes[kWarp] = {};
  const int start = self.block * threads, first = start + self.index / kWarp * kWarp;
  const int last = std::min(first + kWarp, start + threads);
  for (int i = first; i < last; ++i) {
    Fiber& f = fibers[i];
    if (!(mask >> (i - first) & 1)) continue;
    if (f.state != State::in_exchange || f.mask != mask || f.complete != complete)
      return to_scheduler();
    lanes[i - first] = f.mine;
  }
  complete(lanes);
  for (int i = first; i < last; ++i)
    if (lanes[i - first]) fibers[i].state = State::ready;
}

int set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > most_shared()) return cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

int run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster_size,
        const std::function<void()>& thread) {
  const auto limit = shared_limits.find(kernel);
  if (shared_bytes >
      static_cast<std::size_t>(limit == shared_limits.end() ? kSharedDefault : limit->second))
    return cudaErrorInvalidValue;
  const std::uint64_t count = std::uint64_t(block.x) * block.y * block.z;
  const unsigned all = grid.x * grid.y * grid.z;
  if (count == 0 || count > kThreadLimit || all == 0 || grid.x % cluster_size != 0 ||
      cluster_size > kClusterLimit)
    return cudaErrorInvalidConfiguration;
  threads = static_cast<int>(count);
  cluster = static_cast<int>(cluster_size);
  body = &thread;
  blockDim = block;
  gridDim = grid;
  shared_size = shared_bytes;
  blocks = std::vector<Block>(cluster);
  for (Block& b : blocks) b.shared.reset(new (std::align_val_t{128}) char[shared_bytes]);
  for (int i = 0; i < threads * cluster; ++i) {
    if (i == static_cast<int>(fibers.size())) {
      Fiber& f = fibers.emplace_back();
      f.context.prepare(f.stack.get(), kStack, entry);
    }
    const unsigned t = i % threads;
    fibers[i].index = static_cast<int>(t);
    fibers[i].block = i / threads;
    fibers[i].thread = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
  }
  std::vector<unsigned> order(all / cluster_size);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  variables = find_variables();
  for (const unsigned c : order) {
    for (int i = 0; i < cluster; ++i) {
      const unsigned b = c * cluster_size + i;
      blocks[i].index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      blocks[i].ended = 0;
      for (Barrier& barrier : blocks[i].barriers) barrier = {};
      fill_with_noise(blocks[i].shared.get(), blocks[i].shared.get() + shared_bytes);
    }
    fill_with_noise(variables.begin, variables.end);
    for (int i = 0; i < threads * cluster; ++i) {
      fibers[i].state = State::ready;
      fibers[i].copies.assign(1, {});
    }
    run_cluster();
  }
  blocks.clear();
  return cudaSuccess;
}

// --- the primitives ---

void named_barrier(int id, int count) {
  if (id < 1 || id >= kBarriers) fail("named barriers are 1 to 15");
  if (count < kWarp || count % kWarp != 0) fail("a named barrier counts whole warps");
  barrier(id, count);
}

int cluster_rank() { return current->block; }

void cluster_sync() {
  current->state = State::at_cluster_barrier;
  if (++at_cluster_barrier < threads * cluster) return to_scheduler();
  at_cluster_barrier = 0;
  for (int i = 0; i < threads * cluster; ++i)
    if (fibers[i].state == State::at_cluster_barrier) fibers[i].state = State::ready;
}

void* cluster_peer_address(void* address, int rank) {
  if (rank < 0 || rank >= cluster) fail("no such block in the cluster");
  if (!is_shared(address)) fail("an address that is not in shared memory");
  return blocks[rank].shared.get() + (static_cast<char*>(address) - own_block().shared.get());
}

template <std::size_t kSize>
void copy_later(void* to, const void* from, bool valid) {
  if (!is_shared(to)) fail("cp.async to an address that is not in shared memory");
  AsyncCopy copy{to, kSize, {}};
  if (valid) std::memcpy(copy.data.data(), from, kSize);
  std::memset(to, 0xff, kSize);
  current->copies.back().push_back(copy);
}
void cp_async16(void* to, const void* from, bool valid) {
  check_row(to, "cp.async to an address that is not aligned to 16 bytes");
  if (valid) check_row(from, "cp.async from an address that is not aligned to 16 bytes");
  copy_later<16>(to, from, valid);
}
void cp_async4(void* to, const void* from, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % 4 ||
      (valid && reinterpret_cast<std::uintptr_t>(from) % 4))
    fail("cp.async of 4 bytes at an address that is not a multiple of 4");
  copy_later<4>(to, from, valid);
}

void cp_async_commit() { current->copies.emplace_back(); }

void cp_async_wait_groups(int left) {
  auto& groups = current->copies;
  for (; static_cast<int>(groups.size()) - 1 > left; groups.pop_front())
    for (const AsyncCopy& copy : groups.front()) std::memcpy(copy.to, copy.data.data(), copy.size);
}

void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  LoadLane lane{r, row};
  meet(0xffffffffu, &lane, load_matrices<4>);
}
void ldmatrix_x2(std::uint32_t (&r)[2], const void* row) {
  LoadLane lane{r, row};
  meet(0xffffffffu, &lane, load_matrices<2>);
}

void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  ProductLane lane{c, a, b};
  meet(0xffffffffu, &lane, multiply<Bf16>);
}
void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  ProductLane lane{c, a, b};
  meet(0xffffffffu, &lane, multiply<Tf32>);
}

std::uint32_t to_tf32(float v) {
  return v != v ? 0x7fffffffu : (std::bit_cast<std::uint32_t>(v) + 0x1000u) & ~0x1fffu;
}

std::uint32_t pack_bf16(float low, float high) {
  const auto round = [](float v) {
    const auto bits = std::bit_cast<std::uint32_t>(v);
    return v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}

}  // namespace fasthyp::simt

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  std::strcpy(properties->name, "host emulation");
  properties->major = properties->minor = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = simt::setting("SIMT_MAJOR", 9);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = simt::kSharedDefault;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = simt::most_shared();
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = simt::most_shared() + 1024;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaFree(void* p) {
  ::operator delete(p);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
