#include "native.h"

#ifdef STEP_WITH_CUDA
extern "C" int step_merge_audio(const void* audio, const int64_t* positions, int64_t count, void* tokens, int64_t length,
                                int64_t row_bytes, void* stream);
extern "C" int step_merge_audio_backward(const void* gradient, const int64_t* positions, int64_t count, int32_t* source,
                                         void* tokens, void* audio, int64_t length, int64_t row_bytes, void* stream);
#endif

namespace step {

// Rows of any type: `audio` has as many as `positions`, `tokens` as many as the sequence is long.
struct MergeShape {
  int64_t length, count, row_bytes;

  MergeShape(const Tensor& tokens, const Tensor& audio, const Tensor& positions)
      : length(tokens.size(0)), count(positions.size(0)) {
    check(positions, "positions", ScalarType::Long, 1);
    STD_TORCH_CHECK(tokens.is_contiguous() && audio.is_contiguous(), "tokens and audio must be contiguous");
    STD_TORCH_CHECK(tokens.scalar_type() == audio.scalar_type(), "tokens and audio must have one dtype");
    STD_TORCH_CHECK(audio.size(0) == count, "audio and positions must agree");
    row_bytes = tokens.element_size();
    for (int64_t d = 1; d < tokens.dim(); d++) row_bytes *= tokens.size(d);
    STD_TORCH_CHECK(audio.numel() * audio.element_size() == static_cast<size_t>(count * row_bytes), "audio has another row size");
  }
};

static const int64_t* longs(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
static int32_t* mutable_ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }
static const char* bytes(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }
static char* mutable_bytes(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }
// The gradient of the tokens where it is wanted; an empty tensor says that it is not.
static char* wanted(const Tensor& tensor) { return tensor.numel() ? mutable_bytes(tensor) : nullptr; }

static void check_source(const Tensor& source, const MergeShape& shape) {
  check(source, "source", ScalarType::Int, 1);
  STD_TORCH_CHECK(source.size(0) == shape.length, "source and tokens must agree");
}

static void merge_audio_cpu(const Tensor& audio, const Tensor& positions, const Tensor& tokens) {
  const MergeShape shape(tokens, audio, positions);
  STD_TORCH_CHECK(STEP_CPU(merge_audio, bytes(audio), longs(positions), shape.count, mutable_bytes(tokens), shape.length,
                           shape.row_bytes),
                  "merge_audio_embeddings: a position lies outside the ", shape.length, " tokens");
}

static void merge_audio_backward_cpu(const Tensor& gradient, const Tensor& positions, const Tensor& source, const Tensor& tokens,
                                     const Tensor& audio) {
  const MergeShape shape(gradient, audio, positions);
  check_source(source, shape);
  STD_TORCH_CHECK(STEP_CPU(merge_audio_source, longs(positions), shape.count, mutable_ints(source), shape.length),
                  "merge_audio_embeddings: a position lies outside the ", shape.length, " tokens");
  STEP_CPU(merge_audio_backward, bytes(gradient), ints(source), wanted(tokens), mutable_bytes(audio), shape.length,
           shape.row_bytes);
}

#ifdef STEP_WITH_CUDA
static void merge_audio_cuda(const Tensor& audio, const Tensor& positions, const Tensor& tokens) {
  const MergeShape shape(tokens, audio, positions);
  CudaScope scope(tokens);
  launched(step_merge_audio(bytes(audio), longs(positions), shape.count, mutable_bytes(tokens), shape.length, shape.row_bytes,
                            scope.stream()),
           "merge_audio_embeddings");
}

static void merge_audio_backward_cuda(const Tensor& gradient, const Tensor& positions, const Tensor& source, const Tensor& tokens,
                                      const Tensor& audio) {
  const MergeShape shape(gradient, audio, positions);
  check_source(source, shape);
  CudaScope scope(gradient);
  launched(step_merge_audio_backward(bytes(gradient), longs(positions), shape.count, mutable_ints(source), wanted(tokens),
                                     mutable_bytes(audio), shape.length, shape.row_bytes, scope.stream()),
           "merge_audio_embeddings, backward");
}
#endif

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("merge_audio(Tensor audio, Tensor positions, Tensor(a!) tokens) -> ()");
  m.def("merge_audio_backward(Tensor gradient, Tensor positions, Tensor(a!) source, Tensor(b!) tokens, Tensor(c!) audio) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("merge_audio", TORCH_BOX(&step::merge_audio_cpu));
  m.impl("merge_audio_backward", TORCH_BOX(&step::merge_audio_backward_cpu));
}
#ifdef STEP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(step_native, CUDA, m) {
  m.impl("merge_audio", TORCH_BOX(&step::merge_audio_cuda));
  m.impl("merge_audio_backward", TORCH_BOX(&step::merge_audio_backward_cuda));
}
#endif
