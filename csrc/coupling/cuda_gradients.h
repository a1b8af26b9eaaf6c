// Per element, on the device: what training needs beyond cuda_operands.h.
#pragma once

#include "coupling/cuda_operands.h"
#include "coupling/cuda_training.h"

namespace fasthyp::coupling::cuda::training {

// Whether the derivative of an activation follows from its result; else its argument is needed.
inline bool derivative_of_result(int activation, float slope) {
  switch (static_cast<Activation>(activation)) {
    case Activation::relu:
    case Activation::tanh:
      return true;
    case Activation::leaky_relu:
      return slope > 0;
    default:
      return false;
  }
}

// Calls f with the derivative as a function of the result (relu, leaky_relu with a positive slope,
// tanh) or of the argument.
template <class F>
__device__ __forceinline__ void with_derivative(int kind, float slope, const F& f) {
  switch (kind) {
    case static_cast<int>(Activation::relu):
      return f([](float v) { return v <= 0.0f ? 0.0f : 1.0f; });
    case static_cast<int>(Activation::leaky_relu):
      return f([=](float v) { return v > 0.0f ? 1.0f : slope; });
    case static_cast<int>(Activation::silu):
      return f([](float v) {
        const float s = 1.0f / (1.0f + expf(-v));
        return s * (1.0f + v * (1.0f - s));
      });
    case static_cast<int>(Activation::tanh):
      return f([](float v) { return 1.0f - v * v; });
    case static_cast<int>(Activation::gelu):
      return f([](float v) {
        return 0.5f * (1.0f + erff(v * 0.70710678f)) + v * 0.39894228f * expf(-0.5f * v * v);
      });
    case static_cast<int>(Activation::gelu_tanh):
      return f([](float v) {
        const float t = tanhf(0.79788456f * (v + 0.044715f * v * v * v));
        return 0.5f * (1.0f + t) +
               0.5f * v * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * v * v);
      });
    default:
      return;
  }
}

// The derivative of soft_clamp.
__device__ __forceinline__ float soft_clamp_slope(float raw, float clamp, int kind) {
  switch (kind) {
    case static_cast<int>(Clamp::atan):
      return clamp * 0.636f / (1.0f + raw * raw);
    case static_cast<int>(Clamp::atan_scaled): {
      const float u = raw / clamp;
      return 0.636f / (1.0f + u * u);
    }
    case static_cast<int>(Clamp::tanh): {
      const float t = tanhf(raw);
      return clamp * (1.0f - t * t);
    }
    case static_cast<int>(Clamp::tanh_scaled): {
      const float t = tanhf(raw / clamp);
      return 1.0f - t * t;
    }
    case static_cast<int>(Clamp::sigmoid): {
      const float t = tanhf(0.5f * raw);
      return 0.5f * clamp * (1.0f - t * t);
    }
    default:
      return 1.0f;
  }
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ __forceinline__ int image_of(const Images& images, int row) {
  return row < images.lead ? 0 : 1 + (row - images.lead) / images.per;
}

}  // namespace fasthyp::coupling::cuda::training
