// The clustering solver: the exact assignment step of k-means with a minimum cluster size, and the two passes over the
// rows of W around it. idlora_ext/rows/{kmeans,passes,assignment}.py say what is computed and why; they are the
// reference, and the fallback. All arrays are of the host; those without a stride are contiguous. k clusters, d rows.
#pragma once

#include <cstdint>
#include <functional>

namespace idlora {

enum class Element { float64, float32, float16, bfloat16 };

struct Rows {
  const void* W;  // [d, d_in]
  int64_t d, d_in;
  int64_t stride;  // between rows, in elements
  Element element;
};

// labels [d] = argmin sum_i costs[i, labels_i] subject to |{i: labels_i = c}| >= min_size, where k * min_size <= d.
// False, and no labels, if costs [d, k] are not finite or differences within a row overflow. `poll` is called between
// steps; what it throws ends the search.
bool assign(const double* costs, int64_t d, int64_t k, int64_t min_size, int64_t* labels,
            const std::function<void()>& poll);

// squares [d] = |W_i - origin|^2
void row_squares(const Rows& rows, const double* origin, double* squares, int threads);

// distances [d, k] = |W_i - origin - e_c|^2, rounded to a grid `bits` bits below squares_i + max_c |e_c|^2; never < 0.
void row_distances(const Rows& rows, const double* origin, const double* squares, const double* e, int64_t k, int bits,
                   double* distances, int threads);

// sums [k, d_in] follow the rows: sums[before_i] -= W_i and sums[after_i] += W_i where before_i is not after_i. A
// negative label is no cluster.
void move_rows(const Rows& rows, const int64_t* before, const int64_t* after, double* sums, int threads);

}  // namespace idlora
