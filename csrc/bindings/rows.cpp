// The clustering solver on numpy arrays: idlora_ext._C.clustering.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "idlora/rows.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Labels = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::string shape_of(const py::array& x) { return py::str(py::tuple(x.attr("shape"))); }

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

void require_shape(const char* op, const char* name, const py::array& x, const std::vector<int64_t>& expected) {
  if (std::equal(expected.begin(), expected.end(), x.shape(), x.shape() + x.ndim())) return;
  py::list sizes;
  for (int64_t n : expected) sizes.append(n);
  throw py::value_error(std::string(op) + ": " + name + " must have shape " + std::string(py::str(py::tuple(sizes))) +
                        ", got " + shape_of(x));
}

// W [d, d_in] as it lies in memory.
idlora::Rows rows_of(const char* op, const py::array& W) {
  const std::string name = std::string(op) + ": W must ";
  require(W.ndim() == 2 && W.shape(1) >= 1,
          name + "have 2 dimensions, the second at least 1, got shape " + shape_of(W));
  const char kind = W.dtype().kind();
  const py::ssize_t size = W.itemsize();
  idlora::Rows rows{W.data(), W.shape(0), W.shape(1), W.strides(0) / size, idlora::Element::float64};
  if (kind == 'f' && size == 4)
    rows.element = idlora::Element::float32;
  else if (kind == 'f' && size == 2)
    rows.element = idlora::Element::float16;
  else if (kind == 'u' && size == 2)
    rows.element = idlora::Element::bfloat16;
  else if (kind != 'f' || size != 8)
    throw py::type_error(name + "be float64, float32, float16, or bfloat16 as uint16, got " +
                         std::string(py::str(W.dtype())));
  require(py::bool_(W.dtype().attr("isnative")), name + "have the byte order of the machine, got " +
                                                     std::string(py::str(W.dtype())));
  require((W.strides(1) == size || W.shape(1) == 1) && W.strides(0) % size == 0,
          name + "have contiguous rows, got strides " + std::string(py::str(py::tuple(W.attr("strides")))));
  return rows;
}

// Lets Ctrl-C through, at most every so often: to take the lock of the interpreter may take it long.
class Poll {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

Labels assign(const Doubles& distances, int64_t min_size) {
  require(distances.ndim() == 2 && distances.shape(1) >= 1,
          "assign: distances must have 2 dimensions, the second at least 1, got shape " + shape_of(distances));
  const int64_t d = distances.shape(0), k = distances.shape(1);
  require(min_size >= 0 && min_size <= d / k,
          "assign: min_size must be from 0 to d / k = " + std::to_string(d / k) + ", got " + std::to_string(min_size));
  Labels labels(d);
  bool finite;
  {
    const double* from = distances.data();
    int64_t* to = labels.mutable_data();
    py::gil_scoped_release release;
    finite = idlora::assign(from, d, k, min_size, to, Poll());
  }
  require(finite, "assign: distances must be finite, got NaN, inf or differences that overflow");
  return labels;
}

Doubles row_squares(const py::array& W, const Doubles& origin, int threads) {
  const idlora::Rows rows = rows_of("row_squares", W);
  require_shape("row_squares", "origin", origin, {rows.d_in});
  Doubles squares(rows.d);
  const double* o = origin.data();
  double* to = squares.mutable_data();
  py::gil_scoped_release release;
  idlora::row_squares(rows, o, to, threads);
  return squares;
}

Doubles row_distances(const py::array& W, const Doubles& origin, const Doubles& squares, const Doubles& e, int bits,
                      int threads) {
  const idlora::Rows rows = rows_of("row_distances", W);
  require(e.ndim() == 2, "row_distances: e must have 2 dimensions, got shape " + shape_of(e));
  const int64_t k = e.shape(0);
  require_shape("row_distances", "origin", origin, {rows.d_in});
  require_shape("row_distances", "squares", squares, {rows.d});
  require_shape("row_distances", "e", e, {k, rows.d_in});
  Doubles distances({rows.d, k});
  const double *o = origin.data(), *s = squares.data(), *centroids = e.data();
  double* to = distances.mutable_data();
  py::gil_scoped_release release;
  idlora::row_distances(rows, o, s, centroids, k, bits, to, threads);
  return distances;
}

void move_rows(const py::array& W, const Labels& before, const Labels& after, py::array_t<double>& sums, int threads) {
  const idlora::Rows rows = rows_of("move_rows", W);
  require(sums.ndim() == 2 && (sums.flags() & py::array::c_style),
          "move_rows: sums must be contiguous and have 2 dimensions, got shape " + shape_of(sums));
  const int64_t k = sums.shape(0);
  require_shape("move_rows", "before", before, {rows.d});
  require_shape("move_rows", "after", after, {rows.d});
  require_shape("move_rows", "sums", sums, {k, rows.d_in});
  const int64_t *from = before.data(), *to = after.data();
  for (int64_t i = 0; i < rows.d; ++i)
    require(from[i] < k && to[i] < k, "move_rows: labels must be less than k = " + std::to_string(k) + ", got " +
                                          std::to_string(std::max(from[i], to[i])));
  double* into = sums.mutable_data();
  py::gil_scoped_release release;
  idlora::move_rows(rows, from, to, into, threads);
}

}  // namespace

void bind_rows(py::module_& module) {
  py::module_ m = module.def_submodule(
      "clustering",
      "What idlora_ext/rows/passes.py and assignment.py compute on the CPU, on numpy arrays. bfloat16 comes as uint16, "
      "the same bits. No result depends on the number of threads.");
  m.def("assign", &assign, py::arg("distances"), py::arg("min_size"),
        "labels [d] int64 = argmin sum_i distances[i, labels_i] subject to |{i: labels_i = c}| >= min_size; exact.\n\n"
        "distances [d, k] float64, finite; min_size from 0 to d / k (ValueError). As idlora_ext/rows/assignment.py.");
  m.def("row_squares", &row_squares, py::arg("W"), py::arg("origin"), py::arg("threads") = 1,
        "squares [d] = |W_i - origin|^2\n\n"
        "W [d, d_in] float64, float32, float16 or bfloat16, any distance between its rows; origin [d_in] float64.");
  m.def("row_distances", &row_distances, py::arg("W"), py::arg("origin"), py::arg("squares"), py::arg("e"),
        py::arg("bits"), py::arg("threads") = 1,
        "distances [d, k] = |W_i - origin - e_c|^2, rounded to a grid `bits` bits below squares_i + max_c |e_c|^2.\n\n"
        "W [d, d_in] as for row_squares, whose result is squares [d]; origin [d_in] and e [k, d_in] float64.");
  m.def("move_rows", &move_rows, py::arg("W"), py::arg("before"), py::arg("after"), py::arg("sums").noconvert(),
        py::arg("threads") = 1,
        "sums[before_i] -= W_i and sums[after_i] += W_i where before_i is not after_i; a negative label is no cluster."
        "\n\nW [d, d_in] as for row_squares; before and after [d] int64; sums [k, d_in] float64, changed in place.");
}
