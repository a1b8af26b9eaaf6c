#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace simt {
namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kSharedLimit = 48 * 1024;
constexpr unsigned kThreadLimit = 1024;
constexpr int kWarp = 32;
constexpr std::size_t kExchange = 16;  // bytes a lane can hand over

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
  dim3 thread;
  int index = 0;
  unsigned mask = 0;  // of the exchange it waits in
  std::size_t bytes = 0;
  alignas(16) char given[2][kExchange];
  unsigned exchanges = 0;
};

std::mt19937_64 random;
std::vector<Fiber> fibers;
Fiber* current = nullptr;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;
std::unique_ptr<char[]> shared;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::exit(86);
}

void to_scheduler() {
  Fiber* self = current;
  __sanitizer_start_switch_fiber(self->state == State::done ? nullptr : &self->fake_stack,
                                 scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  current->state = State::done;
  to_scheduler();
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Lets go those whose wait is over.
void release(const Fiber& last) {
  const auto waits_or_ended = [](const Fiber& f) {
    return f.state == State::at_barrier || f.state == State::done;
  };
  if (std::all_of(fibers.begin(), fibers.end(), waits_or_ended)) {
    for (Fiber& f : fibers)
      if (f.state == State::at_barrier) f.state = State::ready;
    return;
  }
  if (last.state != State::at_exchange) return;
  const int first = last.index / kWarp * kWarp;
  std::vector<Fiber*> lanes;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(last.mask >> lane & 1) || first + lane >= static_cast<int>(fibers.size())) continue;
    Fiber& f = fibers[first + lane];
    if (f.state != State::at_exchange) return;
    if (f.mask != last.mask || f.bytes != last.bytes || f.exchanges != last.exchanges)
      fail("the lanes of a warp are in different shuffles");
    lanes.push_back(&f);
  }
  for (Fiber* f : lanes) f->state = State::ready;
}

void run_block() {
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (const Fiber& f : fibers) {
      if (f.state == State::ready) ready.push_back(f.index);
      all_done = all_done && f.state == State::done;
    }
    if (all_done) return;
    if (ready.empty()) fail("deadlock: threads wait at different places");
    // All that are ready now run once, in a drawn order.
    std::shuffle(ready.begin(), ready.end(), random);
    for (const int index : ready) {
      resume(fibers[index]);
      release(fibers[index]);
    }
  }
}

}  // namespace

int lane_index() { return current->index % kWarp; }
void* dynamic_shared() { return shared.get(); }
void set_seed(std::uint64_t seed) { random.seed(seed); }

void block_barrier() {
  current->state = State::at_barrier;
  to_scheduler();
}

void exchange(unsigned mask, const void* give, void* take, int lane, std::size_t bytes) {
  Fiber& self = *current;
  if (bytes > kExchange) fail("shuffle of too large a value");
  if (!(mask >> lane_index() & 1)) fail("shuffle by a lane that is not in its mask");
  const unsigned turn = self.exchanges++ % 2;  // the one before may still be being read
  std::memcpy(self.given[turn], give, bytes);
  self.mask = mask;
  self.bytes = bytes;
  self.state = State::at_exchange;
  to_scheduler();
  const std::size_t other = self.index / kWarp * kWarp + lane;
  if (!(mask >> lane & 1) || other >= fibers.size()) fail("shuffle from a lane that takes no part");
  std::memcpy(take, fibers[other].given[turn], bytes);
}

int run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kThreadLimit || shared_bytes > kSharedLimit ||
      grid.x * grid.y * grid.z == 0)
    return cudaErrorInvalidConfiguration;
  body = &thread;
  blockDim = block;
  gridDim = grid;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned b : order) {
    shared.reset(new char[shared_bytes]);
    for (std::size_t i = 0; i < shared_bytes; ++i) shared[i] = static_cast<char>(random());
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    fibers = std::vector<Fiber>(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.index = static_cast<int>(t);
      f.thread = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      prepare(f);
    }
    run_block();
  }
  fibers.clear();
  shared.reset();
  return cudaSuccess;
}

}  // namespace simt

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
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                         : "invalid configuration argument";
}
