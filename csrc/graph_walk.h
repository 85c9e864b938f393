// An autograd graph that is walked through from its roots, with its structure as a text. Nodes and tensors
// are seen as Python objects, by attributes.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch_tensors.h"

namespace hvp {

// What keeps a graph from being read.
struct Hidden {
  std::string reason;
};

inline py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

inline py::object get(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

inline py::object call(PyObject* object, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(object, method));
}

inline bool is_true(const py::object& object) { return object.ptr() == Py_True; }

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// What Python has for a class of nodes, as a tuple.
struct NodeReader {
  PyObject *number, *hidden, *tensors, *plain;
  bool leaf, of_several;

  explicit NodeReader(PyObject* reader) {
    if (!PyTuple_Check(reader) || PyTuple_GET_SIZE(reader) != 6) throw py::type_error("readers");
    number = PyTuple_GET_ITEM(reader, 0);
    hidden = PyTuple_GET_ITEM(reader, 1);
    tensors = PyTuple_GET_ITEM(reader, 2);
    plain = PyTuple_GET_ITEM(reader, 3);
    leaf = PyTuple_GET_ITEM(reader, 4) == Py_True;
    of_several = PyTuple_GET_ITEM(reader, 5) == Py_True;
  }
};

// Public names, made once; private ones come from Python, which has them all in one place.
struct Names {
  PyObject *edges = intern("next_functions"), *variable = intern("variable"), *shape = intern("shape"),
           *stride = intern("stride"), *dtype = intern("dtype"), *device = intern("device"),
           *layout = intern("layout"), *data_ptr = intern("data_ptr"), *is_neg = intern("is_neg"),
           *is_conj = intern("is_conj"), *is_cpu = intern("is_cpu");
  py::object strided, parameter;

  Names() {
    const py::module_ torch = py::module_::import("torch");
    strided = torch.attr("strided");
    parameter = torch.attr("nn").attr("Parameter");
  }

  static PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }

  static const Names& get() {
    static const Names* names = new Names();
    return *names;
  }
};

class Graph {
 public:
  // Walks from the roots, and writes the structure.
  Graph(const py::list& roots, py::list inputs, const py::list& edges, const py::dict& readers,
        const py::function& reader_of)
      : inputs_(std::move(inputs)) {
    walk(roots, readers, reader_of);
    std::vector<int64_t>& text = structure_;
    text.reserve(2 * (roots.size() + inputs_.size()) + 6 * nodes_.size());
    for (const py::handle root : roots) {
      const py::tuple edge = py::reinterpret_borrow<py::tuple>(root);
      text.push_back(index_of(edge[0].ptr()));
      text.push_back(integer(edge[1].ptr()));
    }
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const py::object edge = edges[i];
      if (edge.is_none()) {
        const auto found = leaves_.find(py::object(inputs_[i]).ptr());
        text.push_back(found == leaves_.end() ? -1 : found->second);
        text.push_back(0);
      } else {
        const py::tuple pair = py::reinterpret_borrow<py::tuple>(edge);
        text.push_back(index_of(pair[0].ptr()));
        text.push_back(integer(pair[1].ptr()));
      }
    }
    for (size_t i = 0; i < nodes_.size(); ++i) {
      text.push_back(integer(classes_[i].number));
      text.push_back(static_cast<int64_t>(following_[i].size()));
      for (const py::handle edge : following_[i]) {
        text.push_back(index_of(PyTuple_GET_ITEM(edge.ptr(), 0)));
        text.push_back(integer(PyTuple_GET_ITEM(edge.ptr(), 1)));
      }
    }
  }

  py::bytes structure() const { return bytes(structure_); }

  py::list nodes() const {
    py::list nodes(nodes_.size());
    for (size_t i = 0; i < nodes_.size(); ++i) nodes[i] = nodes_[i];
    return nodes;
  }

  const std::vector<py::object>& owned_nodes() const { return nodes_; }
  const py::list& inputs() const { return inputs_; }
  const py::tuple& following(size_t i) const { return following_[i]; }
  const NodeReader& class_of(size_t i) const { return classes_[i]; }

  static py::bytes bytes(const std::vector<int64_t>& text) {
    return py::bytes(reinterpret_cast<const char*>(text.data()), text.size() * sizeof(int64_t));
  }

 private:
  int64_t index_of(PyObject* node) const {
    const auto found = index_.find(node);
    return found == index_.end() ? -1 : found->second;
  }

  void walk(const py::list& roots, const py::dict& readers, const py::function& reader_of) {
    std::vector<py::object> stack;
    for (size_t i = roots.size(); i-- > 0;) stack.push_back(py::reinterpret_borrow<py::tuple>(roots[i])[0]);
    while (!stack.empty()) {
      py::object node = std::move(stack.back());
      stack.pop_back();
      if (!index_.emplace(node.ptr(), static_cast<int64_t>(nodes_.size())).second) continue;
      const NodeReader reader = reader_for(node.ptr(), readers, reader_of);
      if (PyUnicode_GetLength(reader.hidden) > 0) {
        throw Hidden{py::cast<std::string>(py::handle(reader.hidden))};
      }
      if (reader.leaf) {
        leaves_.emplace(get(node.ptr(), names_.variable).ptr(), static_cast<int64_t>(nodes_.size()));
      }
      py::tuple following = get(node.ptr(), names_.edges);
      for (const py::handle edge : following) {
        PyObject* after = PyTuple_GET_ITEM(edge.ptr(), 0);
        if (after != Py_None && index_.find(after) == index_.end()) {
          stack.push_back(py::reinterpret_borrow<py::object>(after));
        }
      }
      nodes_.push_back(std::move(node));
      following_.push_back(std::move(following));
      classes_.push_back(reader);
    }
  }

  static NodeReader reader_for(PyObject* node, const py::dict& readers, const py::function& reader_of) {
    PyObject* known = PyDict_GetItemWithError(readers.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(node)));
    if (known != nullptr) return NodeReader(known);
    if (PyErr_Occurred()) throw py::error_already_set();
    return NodeReader(reader_of(py::handle(node)).ptr());  // it is in the dict by now
  }

  const Names& names_ = Names::get();
  py::list inputs_;
  std::vector<int64_t> structure_;
  std::vector<py::object> nodes_;
  std::vector<py::tuple> following_;
  std::vector<NodeReader> classes_;
  std::unordered_map<PyObject*, int64_t> index_, leaves_;
};

}  // namespace hvp
