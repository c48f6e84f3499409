// Host-side planning: packing items into bins and sharing them out, for windows of any size. Each function gives what the Python
// reference of its name in kernels/step_kernels/packing.py gives, item for item: plans are part of an exact resume.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <queue>
#include <string>
#include <utility>
#include <vector>

namespace {

using Items = std::vector<int64_t>;
using Bins = std::vector<Items>;

// Indices by falling value; equal ones in their order.
template <class Value>
std::vector<int64_t> falling(const std::vector<Value>& values) {
  std::vector<std::pair<Value, int64_t>> keyed(values.size());
  for (size_t i = 0; i < values.size(); i++) keyed[i] = {values[i], static_cast<int64_t>(i)};
  std::sort(keyed.begin(), keyed.end(),
            [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
  std::vector<int64_t> order(values.size());
  for (size_t i = 0; i < values.size(); i++) order[i] = keyed[i].second;
  return order;
}

void check_fits(const std::vector<int64_t>& lengths, const std::vector<int64_t>& order, int64_t budget) {
  for (int64_t item : order)
    if (lengths[item] < 1 || lengths[item] > budget)
      throw pybind11::value_error("item " + std::to_string(item) + " has " + std::to_string(lengths[item]) + " tokens; a bin holds 1 to " +
                                  std::to_string(budget));
}

// Room of every bin in a tree of maxima: the first bin with room enough is found in as many steps as the tree is high.
class FirstFit {
 public:
  explicit FirstFit(size_t most, int64_t budget) {
    while (leaves_ < most) leaves_ *= 2;
    room_.assign(2 * leaves_, budget);
  }
  // Bins beyond those in use are empty, so there always is one.
  int64_t place(int64_t length) {
    size_t node = 1;
    while (node < leaves_) node = room_[2 * node] >= length ? 2 * node : 2 * node + 1;
    const int64_t bin = static_cast<int64_t>(node - leaves_);
    room_[node] -= length;
    for (node /= 2; node; node /= 2) {
      const int64_t most = std::max(room_[2 * node], room_[2 * node + 1]);
      if (room_[node] == most) break;
      room_[node] = most;
    }
    return bin;
  }

 private:
  size_t leaves_ = 1;
  std::vector<int64_t> room_;
};

Bins first_fit_decreasing(const std::vector<int64_t>& lengths, int64_t budget) {
  const std::vector<int64_t> order = falling(lengths);
  check_fits(lengths, order, budget);
  FirstFit rooms(lengths.size(), budget);
  Bins bins;
  for (int64_t item : order) {
    const size_t bin = static_cast<size_t>(rooms.place(lengths[item]));
    if (bin == bins.size()) bins.emplace_back();
    bins[bin].push_back(item);
  }
  return bins;
}

Bins pack_evenly(const std::vector<int64_t>& lengths, const std::vector<int64_t>& weights, int64_t budget) {
  if (weights.size() != lengths.size()) throw pybind11::value_error("lengths and weights must be of one number");
  const std::vector<int64_t> order = falling(lengths);
  Bins bins(first_fit_decreasing(lengths, budget).size());
  std::vector<int64_t> room(bins.size(), budget), load(bins.size(), 0);
  for (int64_t item : order) {
    int64_t chosen = -1;
    for (size_t bin = 0; bin < bins.size(); bin++)
      if (room[bin] >= lengths[item] &&
          (chosen < 0 || load[bin] < load[chosen] || (load[bin] == load[chosen] && room[bin] > room[chosen])))
        chosen = static_cast<int64_t>(bin);
    if (chosen < 0) {
      chosen = static_cast<int64_t>(bins.size());
      bins.emplace_back();
      room.push_back(budget);
      load.push_back(0);
    }
    bins[chosen].push_back(item);
    room[chosen] -= lengths[item];
    load[chosen] += weights[item];
  }
  bins.erase(std::remove_if(bins.begin(), bins.end(), [](const Items& items) { return items.empty(); }), bins.end());
  return bins;
}

// Dearest first, each to the worker with least so far (the first of equals) that has a place left.
template <class Cost>
Bins share(const std::vector<Cost>& costs, int64_t workers, size_t places) {
  using Load = std::pair<Cost, int64_t>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int64_t worker = 0; worker < workers; worker++) loads.push({Cost(0), worker});
  Bins shares(workers);
  for (int64_t item : falling(costs)) {
    const auto [load, worker] = loads.top();
    loads.pop();
    shares[worker].push_back(item);
    if (shares[worker].size() < places) loads.push({load + costs[item], worker});
  }
  return shares;
}

void check_workers(int64_t workers) {
  if (workers < 1) throw pybind11::value_error(std::to_string(workers) + " workers: at least one is needed");
}

Bins balance(const std::vector<int64_t>& lengths, int64_t workers) {
  check_workers(workers);
  return share(lengths, workers, lengths.size() + 1);
}

Bins balance_evenly(const std::vector<double>& costs, int64_t workers) {
  check_workers(workers);
  if (costs.size() % workers)
    throw pybind11::value_error(std::to_string(costs.size()) + " items cannot be shared out evenly over " + std::to_string(workers) +
                                " ranks; make it a multiple");
  return share(costs, workers, costs.size() / workers);
}

// As lists. Collecting garbage meanwhile, as half a million new lists make Python do over and over, would double the time.
template <class... Arguments>
auto as_lists(Bins (*function)(Arguments...)) {
  return [function](Arguments... arguments) {
    const Bins bins = function(arguments...);
    const int collecting = PyGC_Disable();
    pybind11::object lists = pybind11::cast(bins);
    if (collecting) PyGC_Enable();
    return lists;
  };
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Packing and balancing; see step_kernels.packing.";
  module.def("first_fit_decreasing", as_lists(&first_fit_decreasing));
  module.def("pack_evenly", as_lists(&pack_evenly));
  module.def("balance", as_lists(&balance));
  module.def("balance_evenly", as_lists(&balance_evenly));
}
