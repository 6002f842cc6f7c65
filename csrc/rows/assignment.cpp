// The assignment step under a minimum cluster size: an exact minimum-cost flow.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "idlora/rows.h"

namespace idlora {
namespace {

// Clusters are nodes. The edge a -> b costs the least of cost[i, b] - cost[i, a] over the rows i now in a. Why this is
// exact, and why the Q cheapest rows of an edge are enough, is proved in idlora_ext/rows/assignment.py; ties are settled
// as there.
class Flow {
 public:
  Flow(std::vector<int64_t> cost, std::vector<int64_t> size, int64_t* labels, int64_t d, int64_t min_size)
      : k_(int64_t(size.size())), min_size_(min_size), cost_(std::move(cost)), size_(std::move(size)), labels_(labels),
        heaps_(k_ * k_), edges_(k_ * k_, NONE), length_(k_), via_(k_) {
    for (int64_t n : size_) Q_ += std::max<int64_t>(min_size - n, 0);
    std::vector<std::vector<int64_t>> members(k_);
    for (int64_t i = 0; i < d; ++i) members[labels[i]].push_back(i);
    for (int64_t a = 0; a < k_; ++a) {
      for (int64_t b = 0; b < k_; ++b) {
        if (a == b) continue;
        Heap& heap = heaps_[a * k_ + b];
        for (int64_t i : members[a]) heap.push_back({step(i, a, b), i});
        if (int64_t(heap.size()) > Q_) {
          std::nth_element(heap.begin(), heap.begin() + Q_, heap.end());
          heap.resize(Q_);
          heap.shrink_to_fit();
        }
        std::make_heap(heap.begin(), heap.end(), DEARER);
      }
      refresh(a);
    }
  }

  void run(const std::function<void()>& poll) {
    for (int64_t sent = 0; sent < Q_; ++sent) {
      poll();
      send(cheapest_path());
    }
  }

 private:
  using Move = std::pair<int64_t, int64_t>;  // cost, row
  using Heap = std::vector<Move>;            // the cheapest on top, the lower row in ties
  static constexpr auto DEARER = [](const Move& x, const Move& y) { return x > y; };
  // No edge, no path. Lengths stay within 2^54, however many clusters: edges are within 2^52, a cluster above min_size
  // has one to every other cluster, and no cycle is negative.
  static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();

  int64_t step(int64_t i, int64_t a, int64_t b) const { return cost_[i * k_ + b] - cost_[i * k_ + a]; }

  // The edges that leave a. Rows that have left a are dropped when they reach the top.
  void refresh(int64_t a) {
    for (int64_t b = 0; b < k_; ++b) {
      Heap& heap = heaps_[a * k_ + b];
      while (!heap.empty() && labels_[heap.front().second] != a) {
        std::pop_heap(heap.begin(), heap.end(), DEARER);
        heap.pop_back();
      }
      edges_[a * k_ + b] = heap.empty() ? NONE : heap.front().first;
    }
  }

  // Bellman-Ford: the nodes of a cheapest path from any cluster above min_size to any below, its end first.
  std::vector<int64_t> cheapest_path() {
    for (int64_t c = 0; c < k_; ++c) length_[c] = size_[c] > min_size_ ? 0 : NONE, via_[c] = -1;
    for (bool improved = true; improved;) {  // ends, for no cycle is negative
      improved = false;
      for (int64_t a = 0; a < k_; ++a) {
        if (length_[a] == NONE) continue;
        for (int64_t b = 0; b < k_; ++b) {
          const int64_t cost = edges_[a * k_ + b];
          if (cost == NONE || length_[a] + cost >= length_[b]) continue;
          length_[b] = length_[a] + cost, via_[b] = a, improved = true;
        }
      }
    }
    int64_t end = -1;
    for (int64_t c = 0; c < k_; ++c)
      if (size_[c] < min_size_ && (end < 0 || length_[c] < length_[end])) end = c;
    std::vector<int64_t> path;
    for (int64_t c = end; c >= 0; c = via_[c]) path.push_back(c);
    return path;
  }

  // Hands a row along every edge of the path; only the sizes of its two ends change.
  void send(const std::vector<int64_t>& path) {
    std::vector<int64_t> rows;
    for (size_t i = 0; i + 1 < path.size(); ++i) rows.push_back(heaps_[path[i + 1] * k_ + path[i]].front().second);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t row = rows[i], b = path[i];
      labels_[row] = b;
      for (int64_t c = 0; c < k_; ++c) {
        if (c == b) continue;
        Heap& heap = heaps_[b * k_ + c];
        heap.push_back({step(row, b, c), row});
        std::push_heap(heap.begin(), heap.end(), DEARER);
      }
    }
    --size_[path.back()];
    ++size_[path.front()];
    for (int64_t a : path) refresh(a);
  }

  int64_t k_, min_size_, Q_ = 0;
  std::vector<int64_t> cost_, size_;
  int64_t* labels_;
  std::vector<Heap> heaps_;  // [k, k]
  std::vector<int64_t> edges_;
  std::vector<int64_t> length_, via_;
};

}  // namespace

bool assign(const double* costs, int64_t d, int64_t k, int64_t min_size, int64_t* labels,
            const std::function<void()>& poll) {
  std::vector<int64_t> size(k);
  double largest = 0;  // regret: the cost beyond that of the cheapest cluster
  for (int64_t i = 0; i < d; ++i) {
    const double* row = costs + i * k;
    const int64_t best = std::min_element(row, row + k) - row;  // the first of several
    for (int64_t c = 0; c < k; ++c) {
      const double regret = row[c] - row[best];
      if (!std::isfinite(regret)) return false;
      largest = std::max(largest, regret);
    }
    labels[i] = best;
    ++size[best];
  }
  if (*std::min_element(size.begin(), size.end()) >= min_size) return true;
  // Integers, so that sums along paths are exact: regrets in 2^-51 of a power of two which makes them less than 2.
  int exponent;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - 1);
  std::vector<int64_t> cost(d * k);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t c = 0; c < k; ++c)
      cost[i * k + c] = std::llrint((costs[i * k + c] - costs[i * k + labels[i]]) / unit * 0x1p51);
  Flow(std::move(cost), std::move(size), labels, d, min_size).run(poll);
  return true;
}

}  // namespace idlora
