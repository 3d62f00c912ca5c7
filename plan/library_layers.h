#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/plan/structure.h>

#include <string>

namespace torchgraft {

// A whole CLIP has two towers. A Structure numbers their layers in the order in which they run, those of the pictures
// first; the adapters library those of the text first, and its prefixes of each tower have an MLP of their own.

// Whether `structure` is of both towers, as their paths show: all of its attentions are in
// "text_model.encoder.layers.<number>.self_attn" or "vision_model. ...", each tower counts from 0, and there are both.
// A frozen module has no paths.
bool is_whole_clip(const Structure& structure);

// The key of the MLP that makes the prefix of `layer`: the location, or in a whole CLIP the library's name for that of
// the tower ("clip_text_model_self_prefix").
std::string prefix_pool(const Structure& structure, const Layer& layer);

// `config` with the numbers of `structure` in place of the library's, if its wired_for says that it has these ("clip");
// wired_for is empty then. Throws c10::Error when `structure` is not of a whole CLIP, or lacks a layer of that number.
AdapterConfig numbered_as_found(AdapterConfig config, const Structure& structure);

// The inverse, where `structure` is of a whole CLIP and the numbers matter. Sets wired_for. Leaves a configuration with
// an invertible adapter as it is: the library has that of a whole CLIP elsewhere.
AdapterConfig numbered_as_in_library(AdapterConfig config, const Structure& structure);

}  // namespace torchgraft
