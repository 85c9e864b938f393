// Reads an autograd graph as hvp_engine.differentiation.graph_structure and recorded.graph_contents do in
// Python, which say what for: the same texts and the same tensors, in a quarter of the time. Nodes and
// tensors are seen as Python objects, by attributes.
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings.h"
#include "graph_walk.h"
#include "torch_tensors.h"

namespace hvp {
namespace {

// In front of a value in the text.
enum Tag : int64_t { kTensor, kInteger, kList, kOther };

// Reads what the nodes of a graph hold.
class ContentsReader {
 public:
  ContentsReader(const py::dict& numbers, const py::tuple& names)
      : numbers_(numbers), metadata_(names[0]), unpack_hook_(names[1]), is_zero_(names[2]) {}

  // (text, tensors, numbers): see GraphContents.
  py::tuple read(const Graph& graph) {
    for (const py::handle input : graph.inputs()) add_kind(input.ptr());
    for (size_t i = 0; i < graph.owned_nodes().size(); ++i) {
      add_node(graph.owned_nodes()[i].ptr(), graph.following(i), graph.class_of(i));
    }
    return py::make_tuple(Graph::bytes(text_), tensors_, scalars_);
  }

 private:
  void add(int64_t value) { text_.push_back(value); }

  // A thing's number, by the dict that Python has of them.
  void add_number_of(PyObject* thing) {
    PyObject* known = PyDict_GetItemWithError(numbers_.ptr(), thing);
    if (known != nullptr) return add(integer(known));
    if (PyErr_Occurred()) throw py::error_already_set();
    add(integer(owned(PyObject_GetItem(numbers_.ptr(), thing)).ptr()));
  }

  void add_node(PyObject* node, const py::tuple& following, const NodeReader& reader) {
    bool checked = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(reader.tensors); ++i) {
      PyObject* names = PyTuple_GET_ITEM(reader.tensors, i);
      if (!checked) check_packed(get(node, PyTuple_GET_ITEM(names, 1)));
      const py::object saved = get(node, PyTuple_GET_ITEM(names, 0));
      checked |= add_value(saved.ptr());  // all of a node's are packed alike, but numbers
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(reader.plain); ++i) {
      add_value(get(node, PyTuple_GET_ITEM(reader.plain, i)).ptr());
    }
    int64_t constants = 0;
    for (const py::handle edge : following) constants += PyTuple_GET_ITEM(edge.ptr(), 0) == Py_None;
    if (reader.of_several && constants > 1) {
      throw Hidden{"a cat of several constants, whose sizes the graph does not show"};
    }
    const py::list metadata = get(node, metadata_.ptr());
    add(static_cast<int64_t>(metadata.size()));
    for (const py::handle one : metadata) {
      add_number_of(get(one.ptr(), names_.dtype).ptr());
      add_integers(get(one.ptr(), names_.shape));
    }
  }

  void check_packed(const py::object& saved) const {
    if (PyTuple_CheckExact(saved.ptr()) || PyList_CheckExact(saved.ptr())) {
      for (const py::handle one : py::reinterpret_borrow<py::sequence>(saved)) check_unhooked(one.ptr());
    } else {
      check_unhooked(saved.ptr());
    }
  }

  void check_unhooked(PyObject* saved) const {
    if (!get(saved, unpack_hook_.ptr()).is_none())
      throw Hidden{"saved-tensor hooks, as of gradient checkpointing"};
  }

  void add_integers(const py::object& sequence) {
    const py::object items = owned(PySequence_Fast(sequence.ptr(), "expected a sequence of integers"));
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
    add(count);
    for (Py_ssize_t i = 0; i < count; ++i) add(integer(PySequence_Fast_GET_ITEM(items.ptr(), i)));
  }

  void add_kind(PyObject* tensor) {
    add_integers(get(tensor, names_.shape));
    add_integers(call(tensor, names_.stride));
    add_number_of(get(tensor, names_.dtype).ptr());
    add_number_of(get(tensor, names_.device).ptr());
  }

  // What a node has saved; returns whether it is a tensor of some dimension.
  bool add_value(PyObject* value) {
    if (Torch::get().is_tensor(value)) return add_tensor(value);
    if (PyTuple_CheckExact(value) || PyList_CheckExact(value)) {
      const py::object items = owned(PySequence_Fast(value, ""));
      add(kList);
      add(PySequence_Fast_GET_SIZE(items.ptr()));
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
        add_value(PySequence_Fast_GET_ITEM(items.ptr(), i));
      }
      return false;
    }
    if (PyLong_CheckExact(value)) {
      int overflow = 0;
      const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow == 0) {
        add(kInteger);
        add(number);
        return false;
      }
    }
    add(kOther);  // with its type, since True == 1 == 1.0
    add_number_of(owned(PyTuple_Pack(2, Py_TYPE(value), value)).ptr());
    return false;
  }

  bool add_tensor(PyObject* tensor) {
    if (!is_plain(tensor)) {
      throw Hidden{
          std::string("a ") +
          py::cast<std::string>(py::handle(reinterpret_cast<PyObject*>(Py_TYPE(tensor))).attr("__name__")) +
          " that is not strided, or is a lazy view"};
    }
    const int64_t place = static_cast<int64_t>(tensors_.size());
    tensors_.append(py::handle(tensor));
    add(kTensor);
    const size_t start = text_.size();
    add_kind(tensor);
    const int64_t address =
        integer(call(tensor, names_.data_ptr).ptr());  // 0: zeros without memory, or nothing
    add(address == 0 ? -1 : places_.emplace(address, place).first->second);
    const bool shaped = text_[start] > 0;
    if (!shaped && is_true(get(tensor, names_.is_cpu))) scalars_.append(place);
    return shaped;
  }

  bool is_plain(PyObject* tensor) const {
    PyTypeObject* type = Py_TYPE(tensor);
    return (type == Torch::get().type || reinterpret_cast<PyObject*>(type) == names_.parameter.ptr()) &&
           get(tensor, names_.layout).is(names_.strided) && !is_true(call(tensor, names_.is_neg)) &&
           !is_true(call(tensor, names_.is_conj)) && !is_true(call(tensor, is_zero_.ptr()));
  }

  const Names& names_ = Names::get();
  py::dict numbers_;
  py::object metadata_, unpack_hook_, is_zero_;
  std::vector<int64_t> text_;
  std::unordered_map<int64_t, int64_t> places_;
  py::list tensors_, scalars_;
};

}  // namespace

void bind_graph_contents(py::module_& module) {
  py::class_<Graph>(module, "Graph", "A graph that has been walked through.")
      .def_property_readonly("structure", &Graph::structure)
      .def_property_readonly("nodes", &Graph::nodes)
      .def(
          "contents",
          [](const Graph& graph, const py::dict& numbers, const py::tuple& names) -> py::object {
            try {
              return ContentsReader(numbers, names).read(graph);
            } catch (const Hidden& hidden) {
              return py::str(hidden.reason);
            }
          },
          py::arg("numbers"), py::arg("names"), "What its nodes hold; or, as a text, what hides some of it.");
  module.def(
      "walk_graph",
      [](const py::list& roots, const py::list& inputs, const py::list& edges, const py::dict& readers,
         const py::function& reader_of) -> py::object {
        try {
          return py::cast(std::make_unique<Graph>(roots, inputs, edges, readers, reader_of));
        } catch (const Hidden& hidden) {
          return py::str(hidden.reason);
        }
      },
      py::arg("roots"), py::arg("inputs"), py::arg("edges"), py::arg("readers"), py::arg("reader_of"),
      "The graph from the roots on; or, as a text, which class of nodes hides what it holds.");
}

}  // namespace hvp
