// The C interface of the CUDA half: plain pointers to device memory (or pinned host memory where said), sizes,
// and a stream. Every function checks its sizes, enqueues its kernels without waiting for the device, and
// returns 0 or a code that crossan_error() turns into words; the caller has checked the tensors behind the
// pointers (bindings.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// What a code means. Valid until the next call of this thread.
const char* crossan_error(int code);

// Codes from here on are this library's; those below are cudaError_t.
enum { kCrossanBadSize = 100001, kCrossanBadKind = 100002, kCrossanTooLarge = 100003 };

// The architecture (10 · major + minor) of the current device.
int crossan_architecture();

// deduplicate: see crossan_fast/ops/deduplicate.py. `ids` [capacity], `counts` [capacity], `slots` [count];
// an id must be in [0, 2^39), `count` below 2^24. More distinct ids than fit end the launch with an error.
size_t crossan_deduplicate_workspace(int64_t count, int64_t capacity);
int crossan_deduplicate(const void* item_ids, int wide, int64_t count, int64_t capacity, int64_t* ids,
                        int64_t* slots, int64_t* counts, void* workspace, void* stream);

// gather_convert: output [count, groups, width] of `output_kind` (float32, float16, bfloat16) from rows
// [rows, groups, width] of `kind`, times scales [rows, groups] unless null. `states` and `scales` may be
// pinned host memory. Null `ids`: rows 0 … count − 1.
int crossan_gather_convert(const void* states, const float* scales, const void* ids, int wide, int64_t rows,
                           int64_t count, int64_t groups, int64_t width, int kind, void* output,
                           int output_kind, void* stream);

// routing: the router of MOMEF (crossan_fast/ops/fusion.py) from its logits [count, experts] fp32.
// `present` [count, experts] bool or null; `weights` [count] fp32 (how often an item counts) or null;
// top_k 0: every present expert. `probability`, `share` [count, experts]; `assigned`, `mean` [experts];
// `total` [1]: the sum of the weights of items that have an expert.
int crossan_routing_forward(const float* logits, const uint8_t* present, const float* weights, int64_t count,
                            int experts, int top_k, float* probability, float* share, float* assigned,
                            float* mean, float* total, void* stream);
// The logits' gradient from those of `share` and `mean`.
int crossan_routing_backward(const float* grad_share, const float* grad_mean, const float* probability,
                             const float* share, const float* weights, const float* total, int64_t count,
                             int experts, float* grad_logits, void* stream);

}  // extern "C"
