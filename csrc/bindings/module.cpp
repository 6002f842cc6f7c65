// The Python module idlora_ext._C. Importing it registers the kernels of cpu.cpp and cuda.cpp for the ops that
// idlora_ext/ops/library.py has defined; what is not a tensor op is bound with pybind11.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "build_info.h"  // written by setup.py
#include "call_default.h"
#include "idlora/cpu.h"

namespace py = pybind11;

void bind_rows(py::module_& m);
#ifdef IDLORA_CUDA
void bind_cuda(py::module_& m);
#endif

namespace idlora {
namespace {

thread_local PyObject* kept = nullptr;

// torch catches pybind11's exceptions where it returns to Python; then the original one goes on, traceback and all.
struct Kept : py::builtin_exception {
  using builtin_exception::builtin_exception;
  void set_error() const override {
    if (!kept) return PyErr_SetString(PyExc_RuntimeError, what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(kept)), kept);
    Py_CLEAR(kept);
  }
};

}  // namespace

// torch's C interface carries no exceptions, so a default kernel called from here keeps what it raises, returns empty
// tensors, and the exception is raised when the call is back.
void raise_kept() {
  if (!kept) return;
  std::string message;
  {
    py::gil_scoped_acquire gil;
    message = py::str(py::handle(kept));
  }
  throw Kept(message);
}

}  // namespace idlora

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of idlora_ext; see idlora_ext.native.";
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(IDLORA_BUILD_INFO); },
        "What was built: package version, compilers, flags, CUDA architectures.");
  m.def("cpu_capability", &idlora::cpu::capability, "The instruction set that the CPU kernels use.");
  m.def("keep", [](py::object error) { Py_XDECREF(std::exchange(idlora::kept, error.release().ptr())); },
        "Keep what a default kernel called from a native one has raised.");
  bind_rows(m);
#ifdef IDLORA_CUDA
  bind_cuda(m);
#endif
}
