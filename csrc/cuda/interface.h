// The C interface of the CUDA half: plain pointers to device memory (or pinned host memory where said), sizes,
// and a stream. Every function checks its sizes, enqueues its kernels without waiting for the device, and
// returns 0 or a code that crossan_error() turns into words; the caller has checked the tensors behind the
// pointers (the borders).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// What a code means. Valid until the next call of this thread.
const char* crossan_error(int code);

// Codes from here on are this library's; those below are cudaError_t.
enum { kCrossanBadSize = 100001, kCrossanBadKind = 100002, kCrossanTooLarge = 100003, kCrossanBadPath = 100004 };

// The architecture (10 · major + minor) of the current device.
int crossan_architecture();

// deduplicate: see crossan_fast/ops/deduplicate.py. `ids` [capacity], `counts` [capacity], `slots` [count];
// an id must be in [0, 2^39), `count` below 2^24. More distinct ids than fit end the launch with an error.
size_t crossan_deduplicate_workspace(int64_t count, int64_t capacity);
int crossan_deduplicate(const void* item_ids, int wide, int64_t count, int64_t capacity, int64_t* ids, int64_t* slots,
                        int64_t* counts, void* workspace, void* stream);

// gather_convert: output [count, groups, width] of `output_kind` (float32, float16, bfloat16) from rows
// [rows, groups, width] of `kind`, times scales [rows, groups] unless null. `states` and `scales` may be
// pinned host memory. Null `ids`: rows 0 … count − 1.
int crossan_gather_convert(const void* states, const float* scales, const void* ids, int wide, int64_t rows,
                           int64_t count, int64_t groups, int64_t width, int kind, void* output, int output_kind,
                           void* stream);

// routing: the router of MOMEF (crossan_fast/ops/fusion.py) from its logits [count, experts] fp32.
// `present` [count, experts] bool or null; `weights` [count] fp32 (how often an item counts) or null;
// top_k 0: every present expert. `probability`, `share` [count, experts]; `assigned`, `mean` [experts];
// `total` [1]: the sum of the weights of items that have an expert.
int crossan_routing_forward(const float* logits, const uint8_t* present, const float* weights, int64_t count,
                            int experts, int top_k, float* probability, float* share, float* assigned, float* mean,
                            float* total, void* stream);
// The logits' gradient from those of `share` and `mean`.
int crossan_routing_backward(const float* grad_share, const float* grad_mean, const float* probability,
                             const float* share, const float* weights, const float* total, int64_t count, int experts,
                             float* grad_logits, void* stream);

// experts: MOMEF's experts, each on the items with a share of it, and the sum by share (fusion.h). `joined`
// [items, experts · width], `output`, `grad_output` [items, width] of kind `compute_kind` (float16 or bfloat16);
// weights of `weight_kind`; `share` and what comes back of it and of `joined` fp32. `width` is a multiple of 8 up
// to 128, `hidden` a multiple of 8. Where an expert does not run, the backward writes nothing: zeros before.
enum { kCrossanMaxExperts = 16, kCrossanMaxExpertWidth = 128 };

struct CrossanExperts {
  int64_t items;
  int experts, width, hidden, compute_kind, weight_kind;
  const void* joined;
  const float* share;             // [items, experts]; 0: does not run
  const void *w1, *b1, *w2, *b2;  // [experts, hidden, width], [experts, hidden], [experts, width, hidden], …
  void* output;                   // forward
  const void* grad_output;        // backward
  float *grad_joined, *grad_share;
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;  // of `weight_kind`, shaped as the weights
};

size_t crossan_experts_workspace(const struct CrossanExperts* experts, int backward);
int crossan_experts_forward(const struct CrossanExperts* experts, void* workspace, void* stream);
int crossan_experts_backward(const struct CrossanExperts* experts, void* workspace, void* stream);

// side_network: see crossan_fast/ops/side_network.py. Widths must be multiples of 64 and equal among a tower's
// sources, rank a multiple of 8 up to 64, at most 8 levels and 4 sources a tower, the embedding a multiple of 8, of
// which 64 count as a level: together at most 9; states float16, bfloat16, float8_e4m3fn or int8. Weights are
// `weight_kind`, everything else of kind `compute_kind` (float16 or bfloat16).
enum { kCrossanMaxModalities = 8, kCrossanMaxTowers = 16, kCrossanMaxSources = 4, kCrossanMaxLevels = 8 };
enum { kCrossanMaxSlots = kCrossanMaxLevels + 1 };
enum { kCrossanPathAuto = 0, kCrossanPathMma = 1, kCrossanPathHopper = 2 };

struct CrossanSideNetwork {
  int64_t items, rows;
  const void* ids;         // [items] or null
  const uint8_t* present;  // [items, modalities] bool or null
  int wide, modalities, towers, levels, rank, embedding;
  int relu;  // 0: gelu
  int compute_kind, weight_kind, path;
  float temperature;
  int64_t backward_items;  // the backward works on so many at a time, which bounds its workspace; 0: its choice
  const void* states[kCrossanMaxModalities];   // [rows, levels, width]
  const float* scales[kCrossanMaxModalities];  // [rows, levels] or null
  int state_kinds[kCrossanMaxModalities], widths[kCrossanMaxModalities];
  // A modality's tower: itself, then the modalities that it receives from. A pair's tower: the two.
  int sources[kCrossanMaxTowers][kCrossanMaxSources], source_counts[kCrossanMaxTowers];
  int is_pair[kCrossanMaxTowers];
  const void *down_weight[kCrossanMaxTowers], *down_bias[kCrossanMaxTowers], *up_weight[kCrossanMaxTowers],
      *up_bias[kCrossanMaxTowers], *gate[kCrossanMaxTowers], *head_weight[kCrossanMaxTowers],
      *head_bias[kCrossanMaxTowers];
  const void* cross_gate[kCrossanMaxTowers][kCrossanMaxSources - 1];
  void* saved;                  // [towers, items, levels, rank]
  void* embeddings;             // forward: [items, towers, embedding]
  const void* grad_embeddings;  // backward: likewise
  // backward: of `weight_kind`, shaped as the weights
  void *grad_down_weight[kCrossanMaxTowers], *grad_down_bias[kCrossanMaxTowers], *grad_up_weight[kCrossanMaxTowers],
      *grad_up_bias[kCrossanMaxTowers], *grad_gate[kCrossanMaxTowers], *grad_head_weight[kCrossanMaxTowers],
      *grad_head_bias[kCrossanMaxTowers];
  void* grad_cross_gate[kCrossanMaxTowers][kCrossanMaxSources - 1];
};

// The widest tower that the current device's shared memory holds, forward and backward; 0: none.
int crossan_side_network_widest(int levels, int embedding);

// Bytes of scratch, 1,024-aligned, for one call in one direction.
size_t crossan_side_network_workspace(const struct CrossanSideNetwork* network, int backward);
int crossan_side_network_forward(const struct CrossanSideNetwork* network, void* workspace, void* stream);
int crossan_side_network_backward(const struct CrossanSideNetwork* network, void* workspace, void* stream);

}  // extern "C"
