// A pass of a flow in training.
#include "coupling/cuda_training.h"

#include "coupling/cuda_training_engine.h"

namespace fasthyp::coupling::cuda::training {
namespace {

class Forward : Engine {
 public:
  using Engine::Engine;

  void run(const Pass& pass) {
    send_slots();
    check(cudaMemsetAsync(pass.log_det, 0, static_cast<std::size_t>(all_) * 4, on()));
    for (Round round(*this); begin(round);) {
      const std::int64_t at = first_row_ * plan_.dim;
      saved_ = pass.saved;
      exchange(pass.input + at, nullptr, state_, call_.inverse ? slots(0) : nullptr);
      for (int p = 0; p < step_count(); ++p) {
        if (float* kept = kept_state(p)) keep(state_, plan_.dim, kept, width_);
        const Step& step = plan_.steps[number(p)];
        if (const auto* c = std::get_if<Coupling>(&step)) {
          values(*c, number(p));
          Couple couple = couple_of(*c);
          couple.log_det = pass.log_det + first_row_;
          check(launch_couple(couple, false, stream_));
        } else {
          linear(std::get<Linear>(step), call_.inverse);
        }
      }
      exchange(state_, call_.inverse ? nullptr : slots(0), pass.output + at, nullptr);
    }
  }
};

}  // namespace

void run(const Call& call, const Pass& pass, int device, void* stream) {
  if (call.images * call.per_image == 0) return;
  const DeviceGuard guard(device);
  Forward(call, false, device, stream).run(pass);
}

}  // namespace fasthyp::coupling::cuda::training
