// Fixed-width vectors for the kernel sources that CMake compiles once per SIMD level
// (FASTHYP_SIMD = portable, avx2, ...; FASTHYP_SIMD_BYTES = register width).
//
// Everything here lives in a namespace named after the level, so that the linker never merges a
// function compiled for one level with its twin for another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTHYP_INLINE inline __attribute__((always_inline))

namespace fasthyp::FASTHYP_SIMD {

namespace detail {
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FASTHYP_SIMD_BYTES)));
};
template <class T>
struct IntOf {
  using type = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
};
}  // namespace detail

template <class T>
using Vec = typename detail::VectorOf<T>::type;
template <class T>  // lane masks and bit patterns of Vec<T>
using IntVec = Vec<typename detail::IntOf<T>::type>;
template <class T>
inline constexpr int kLanes = FASTHYP_SIMD_BYTES / static_cast<int>(sizeof(T));

template <class T>
FASTHYP_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FASTHYP_INLINE void store(T* p, std::type_identity_t<Vec<T>> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class To, class From>
FASTHYP_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

template <class T>
FASTHYP_INLINE Vec<T> splat(T s) {
#if FASTHYP_SIMD_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_set1_ps(s);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm512_set1_pd(s);
#elif FASTHYP_SIMD_BYTES == 32
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm256_set1_ps(s);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm256_set1_pd(s);
#endif
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = s;
  return v;
}

// a * b + c, rounded once wherever the level has such an instruction. Narrower vectors too.
template <class V>
FASTHYP_INLINE V fma(V a, V b, V c) {
  [[maybe_unused]] constexpr bool single = sizeof(a[0]) == 4;
#if FASTHYP_SIMD_BYTES == 64
  if constexpr (sizeof(V) == 64 && single)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else if constexpr (sizeof(V) == 64)
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
#if FASTHYP_SIMD_BYTES >= 32
  if constexpr (sizeof(V) == 32 && single)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else if constexpr (sizeof(V) == 32)
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else if constexpr (sizeof(V) == 16 && single)
    return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  else if constexpr (sizeof(V) == 16)
    return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
#elif defined(__aarch64__)
  V r;
  for (std::size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i)
    r[i] = single ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// mask lanes are all ones or all zeros, as the comparison operators give them.
template <class T>
FASTHYP_INLINE Vec<T> select(std::type_identity_t<IntVec<T>> mask, Vec<T> yes,
                             std::type_identity_t<Vec<T>> no) {
  return mask ? yes : no;
}

template <class T>
FASTHYP_INLINE IntVec<T> lane_index() {
  IntVec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

template <class V>
FASTHYP_INLINE V sqrt(V a) {
#if FASTHYP_SIMD_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_sqrt_ps((__m512)a);
  else
    return (V)_mm512_sqrt_pd((__m512d)a);
#elif FASTHYP_SIMD_BYTES == 32
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm256_sqrt_ps((__m256)a);
  else
    return (V)_mm256_sqrt_pd((__m256d)a);
#else
  V r;
  for (std::size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i)
    r[i] = sizeof(a[0]) == 4 ? __builtin_sqrtf(a[i]) : __builtin_sqrt(a[i]);
  return r;
#endif
}

}  // namespace fasthyp::FASTHYP_SIMD
