// Vectors of kVectorBytes, on the compiler's vector types. Part of for_each_target.h: stands in the namespace of an
// instruction set, includes nothing.

template <typename acc_t>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / sizeof(acc_t);
  using index_t = std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>;
  typedef acc_t type __attribute__((vector_size(kVectorBytes)));
  typedef index_t indices __attribute__((vector_size(kVectorBytes)));
};

template <typename acc_t>
using Vector = typename VectorOf<acc_t>::type;
template <typename acc_t>
using Indices = typename VectorOf<acc_t>::indices;
template <typename acc_t>
constexpr int kLanes = VectorOf<acc_t>::kLanes;

// Loads `count` numbers of any stored type, zeros after them.
template <typename acc_t, typename scalar_t>
inline Vector<acc_t> load(const scalar_t* data, int count) {
  Vector<acc_t> result = {};
  for (int i = 0; i < count; ++i) {
    result[i] = static_cast<acc_t>(data[i]);
  }
  return result;
}

// Loads a whole vector.
template <typename acc_t, typename scalar_t>
inline Vector<acc_t> load(const scalar_t* data) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    Vector<acc_t> result;
    std::memcpy(&result, data, sizeof(result));
    return result;
#ifdef ROIALIGN_HAS_TARGETS
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && std::is_same_v<acc_t, float> && kVectorBytes == 64) {
    // Word i goes to the upper half of lane i, zero to the lower: one instruction where widening and shifting are two.
    const __m512i to_upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4,
                                              0, 3, 0, 2, 0, 1, 0, 0, 0);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_upper, _mm512_castsi256_si512(words)));
#endif
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && std::is_same_v<acc_t, float>) {
    typedef uint16_t Stored __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    Stored stored;
    std::memcpy(&stored, data, sizeof(stored));
    return reinterpret_cast<Vector<float>>(__builtin_convertvector(stored, Wide) << 16);
#ifdef ROIALIGN_HAS_TARGETS
  } else if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<acc_t, float> && kVectorBytes == 64) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  } else if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<acc_t, float> && kVectorBytes == 32) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
#endif
  } else {
    return load<acc_t>(data, kLanes<acc_t>);
  }
}

template <typename acc_t, typename scalar_t>
inline void store(scalar_t* data, const Vector<acc_t>& vector) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(data, &vector, sizeof(vector));
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && std::is_same_v<acc_t, float>) {
    typedef uint16_t Stored __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    const Wide bits = reinterpret_cast<Wide>(vector);
    const Wide nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Wide quiet_nan = bits - bits + 0x7fc0;
    const Stored stored = __builtin_convertvector(vector == vector ? nearest_even : quiet_nan, Stored);
    std::memcpy(data, &stored, sizeof(stored));
#ifdef ROIALIGN_HAS_TARGETS
  } else if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<acc_t, float> && kVectorBytes == 64) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data),
                        _mm512_maskz_cvtps_ph(0xffff, vector, _MM_FROUND_TO_NEAREST_INT));
  } else if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<acc_t, float> && kVectorBytes == 32) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < kLanes<acc_t>; ++i) {
      data[i] = static_cast<scalar_t>(vector[i]);
    }
  }
}

// Stores the first `count` lanes and touches nothing after them.
template <typename acc_t, typename scalar_t>
inline void store(scalar_t* data, const Vector<acc_t>& vector, int count) {
#ifdef ROIALIGN_HAS_TARGETS
  if constexpr (kVectorBytes == 64 && std::is_same_v<scalar_t, float> && std::is_same_v<acc_t, float>) {
    return _mm512_mask_storeu_ps(data, (1u << count) - 1, vector);
  }
#endif
  scalar_t lanes[kLanes<acc_t>];
  store<acc_t>(lanes, vector);
#ifdef ROIALIGN_HAS_TARGETS
  if constexpr (kVectorBytes == 64 && sizeof(scalar_t) == 2 && std::is_same_v<acc_t, float>) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    return _mm256_mask_storeu_epi16(data, (1u << count) - 1, words);
  }
#endif
  std::copy_n(lanes, count, data);
}

// Lane i of the result is lane indices[i] of the chunks, laid end to end.
template <typename acc_t, int kChunks>
inline Vector<acc_t> shuffle(const Vector<acc_t>* chunks, const Indices<acc_t>& indices) {
  static_assert(kChunks >= 1 && kChunks <= 4, "shuffle takes one to four vectors");
  if constexpr (kChunks == 1) {
    return __builtin_shuffle(chunks[0], indices);
  } else if constexpr (kChunks == 2) {
    return __builtin_shuffle(chunks[0], chunks[1], indices);
  } else {
    // A shuffle of two takes its indices modulo their lanes.
    const Vector<acc_t> low = __builtin_shuffle(chunks[0], chunks[1], indices);
    const Vector<acc_t> high = __builtin_shuffle(chunks[2], chunks[kChunks - 1], indices);
    return indices < 2 * kLanes<acc_t> ? low : high;
  }
}

// Asks for memory ahead of its use. Hardware foresees what follows the first 8 KiB.
template <typename T>
inline void prefetch(const T* data, int64_t count) {
  constexpr int64_t kLine = 64, kEnough = 8 << 10;
  const char* bytes = reinterpret_cast<const char*>(data);
  const int64_t size = std::min<int64_t>(count * sizeof(T), kEnough);
  for (int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(bytes + i);
  }
}

// Calls run with 1 to 4 chunks as a constant; returns false for any other number.
template <typename Run>
inline bool with_constant(int chunks, const Run& run) {
  switch (chunks) {
    case 1:
      run(std::integral_constant<int, 1>());
      return true;
    case 2:
      run(std::integral_constant<int, 2>());
      return true;
    case 3:
      run(std::integral_constant<int, 3>());
      return true;
    case 4:
      run(std::integral_constant<int, 4>());
      return true;
    default:
      return false;
  }
}
