// The backend that runs the ONNX file on the CPU.
#pragma once
#include <memory>

#include "artifact.hpp"
#include "backend.hpp"
#include "onnxruntime/session.hpp"

namespace anybit::ort {

// How the graph keeps its cache, as its inputs show.
struct CacheForm {
  bool is_static = false;
  int capacity = 0;        // of a static cache
  size_t token_bytes = 0;  // of the cache of one token, all layers
};

// Throws Error: the graph lacks a decoder's inputs or outputs, or is not what model.json says.
CacheForm cache_form(const Session& session, const Artifact& artifact);

// slots: sequences that it keeps caches of. The static form's are allocated here, and take memory as
// they fill.
//
// Throws Error: there is no address space for it.
std::unique_ptr<Backend> make_backend(std::unique_ptr<Session> session, const CacheForm& form,
                                      int slots, int vocab);

}  // namespace anybit::ort
