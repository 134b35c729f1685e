// The backend that runs the ONNX file on the CPU.
#pragma once
#include <memory>

#include "artifact.hpp"
#include "backend.hpp"
#include "onnxruntime/graph.hpp"
#include "onnxruntime/session.hpp"

namespace anybit::ort {

// How the graph keeps its cache, as its inputs show, and whether it computes the logits of chosen
// tokens alone.
struct CacheForm {
  bool is_static = false;
  int capacity = 0;        // of a static cache
  size_t token_bytes = 0;  // of the cache of one token, all layers
  bool picks_logits = false;
};

// Throws Error: the graph has other inputs or outputs than a decoder's, or is not what model.json
// says.
CacheForm cache_form(const Graph& graph, const Artifact& artifact);

// slots: sequences that it keeps caches of. The static form's are allocated here, and take memory as
// they fill.
//
// Throws Error: there is no address space for it.
std::unique_ptr<Backend> make_backend(std::unique_ptr<Session> session, const Graph& graph,
                                      const CacheForm& form, int slots, int vocab);

}  // namespace anybit::ort
