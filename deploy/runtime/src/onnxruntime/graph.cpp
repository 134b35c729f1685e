// Reads the few fields of the protocol buffers in an ONNX file that are needed; their numbers are
// those of onnx.proto (github.com/onnx/onnx).
#include "onnxruntime/graph.hpp"

#include <limits>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "anybit/error.hpp"
#include "json.hpp"

namespace anybit::ort {
namespace {

const std::string kGraphFix = "The file is damaged or changed: export the model again";

struct Damaged {};

// The fields of a message, one after the other.
class Message {
 public:
  explicit Message(std::string_view bytes) : bytes_(bytes) {}

  int field = 0;
  uint64_t number = 0;    // of a field that is one
  std::string_view text;  // of a field that is a text or a message

  bool next() {
    if (bytes_.empty()) return false;
    const uint64_t key = varint();
    field = static_cast<int>(key >> 3);
    number = 0;
    text = {};
    switch (key & 7) {
      case 0: number = varint(); break;
      case 1: take(8); break;
      case 2: text = take(varint()); break;
      case 5: take(4); break;
      default: throw Damaged();
    }
    return true;
  }

  // The numbers of a field that may hold one or, packed, several.
  template <class Take>
  void numbers(Take take) const {
    if (text.empty()) return take(static_cast<int64_t>(number));
    for (Message packed(text); !packed.bytes_.empty();) {
      take(static_cast<int64_t>(packed.varint()));
    }
  }

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
    throw Damaged();
  }

  std::string_view take(uint64_t count) {
    if (count > bytes_.size()) throw Damaged();
    const std::string_view taken = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return taken;
  }

  std::string_view bytes_;
};

// Calls `work` with each field of this number.
template <class Work>
void each(std::string_view message, int field, Work work) {
  for (Message all(message); all.next();) {
    if (all.field == field) work(all);
  }
}

std::string_view last(std::string_view message, int field) {
  std::string_view found;
  each(message, field, [&](const Message& one) { found = one.text; });
  return found;
}

// A ValueInfoProto.
std::pair<std::string, TensorType> value_info(std::string_view message) {
  TensorType made;
  const std::string_view tensor = last(last(message, 2), 1);  // TypeProto, its tensor_type
  each(tensor, 1, [&](const Message& one) { made.type = static_cast<ElementType>(one.number); });
  each(last(tensor, 2), 1, [&](const Message& dim) {  // TensorShapeProto
    int64_t size = -1;
    each(dim.text, 1, [&](const Message& one) { size = static_cast<int64_t>(one.number); });
    made.dims.push_back(size);
  });
  return {std::string(last(message, 1)), made};
}

// Bytes of a TensorProto's elements in fp32 where they are floats; 0 where they are not.
size_t fp32_bytes(std::string_view tensor) {
  size_t bytes = sizeof(float);
  int type = kUndefined;
  each(tensor, 1, [&](const Message& one) {
    one.numbers([&](int64_t dim) {
      if (dim < 0 || (dim > 0 && bytes > std::numeric_limits<size_t>::max() / 2 / size_t(dim))) {
        throw Damaged();
      }
      bytes *= static_cast<size_t>(dim);
    });
  });
  each(tensor, 2, [&](const Message& one) { type = static_cast<int>(one.number); });
  return type == kFloat || type == kHalf ? bytes : 0;
}

Graph read(std::string_view model) {
  Graph made;
  const std::string_view graph = last(model, 7);
  if (graph.empty()) throw Damaged();
  std::unordered_map<std::string_view, size_t> constants;  // in fp32
  each(graph, 5, [&](const Message& one) { constants[last(one.text, 8)] = fp32_bytes(one.text); });
  std::unordered_map<std::string_view, std::string_view> transposed;  // from the result
  std::unordered_set<std::string_view> counted;
  each(graph, 1, [&](const Message& node) {  // in the order in which they are computed
    std::vector<std::string_view> inputs;
    each(node.text, 1, [&](const Message& one) { inputs.push_back(one.text); });
    const std::string_view op = last(node.text, 4);
    if (op == "Transpose" && inputs.size() == 1) {
      transposed[last(node.text, 2)] = inputs[0];
    } else if ((op == "MatMul" || op == "Gemm") && inputs.size() > 1) {
      const auto source = transposed.find(inputs[1]);
      const std::string_view matrix = source == transposed.end() ? inputs[1] : source->second;
      const auto constant = constants.find(matrix);
      if (constant != constants.end() && counted.insert(matrix).second) {
        made.copied += constant->second;
      }
    }
  });
  each(graph, 11, [&](const Message& one) {
    auto input = value_info(one.text);
    if (constants.count(input.first) == 0) made.inputs.insert(std::move(input));
  });
  each(graph, 12, [&](const Message& one) { made.outputs.insert(value_info(one.text)); });
  return made;
}

}  // namespace

Graph read_graph(const std::filesystem::path& path) {
  const std::string bytes = read_file(path.string(), kGraphFix);
  try {
    return read(bytes);
  } catch (const Damaged&) {
    throw Error(path.string(), "got a damaged file, expected an ONNX model", kGraphFix);
  }
}

}  // namespace anybit::ort
