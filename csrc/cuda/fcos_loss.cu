// All losses in one kernel: the first blocks process the boxes of points, the others the logits. The
// last block to finish sums the partial sums of all blocks in a fixed order.

#include "box_loss.h"
#include "ops.h"
#include "sigmoid_focal_loss.h"
#include "sums.h"

namespace fcos::cuda {
namespace {

struct Plan {
  FocalPlan focal;
  BoxLosses box;
  int box_blocks;
  bool is_saved;
  void* focal_loss;
  double* partials; // of the boxes, of their quality, of the logits
  unsigned ticket;
};

template <class Real>
__device__ void write_loss(void* to, double sum, const LossScale& scale) {
  if (threadIdx.x == 0 && to != nullptr) {
    *static_cast<Real*>(to) = Real(sum) * scale.of_loss<Real>();
  }
}

template <class Real>
__device__ void add_partials(const Plan& plan) {
  const double* at = plan.partials;
  int boxes = plan.box_blocks, logits = plan.focal.blocks.total();
  double box = sum_partials<0>(at, boxes);
  write_loss<Real>(plan.box.box_loss, box, plan.box.box_scale);
  double quality = sum_partials<1>(at + boxes, boxes);
  write_loss<Real>(plan.box.quality_loss, quality, plan.box.quality_scale);
  double focal = sum_partials<2>(at + 2 * boxes, logits);
  write_loss<Real>(plan.focal_loss, focal, plan.focal.scale);
}

template <int Number>
__device__ void leave_sum(double value, double* to) {
  double sum = block_sum<Number>(value);
  if (threadIdx.x == 0) {
    *to = sum;
  }
}

template <class T, int Gamma, bool Loss, bool Grad>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    loss_kernel(const __grid_constant__ Plan plan) {
  using Real = typename Compute<T>::Type;
  if (!Loss && plan.is_saved &&
      all_upstream_are_one<Real>(plan.focal.scale, plan.box.box_scale, plan.box.quality_scale)) {
    return; // the saved gradients are correct
  }
  int block = int(blockIdx.x) - plan.box_blocks; // of the logits
  if (block < 0) {
    PointLosses<Real> losses =
        take_point<Real, Grad>(plan.box, int64_t(blockIdx.x) * kThreads + threadIdx.x);
    if constexpr (Loss) {
      leave_sum<0>(losses.box, plan.partials + blockIdx.x);
      leave_sum<1>(losses.quality, plan.partials + plan.box_blocks + blockIdx.x);
    }
  } else if (block < plan.focal.blocks.total()) { // else there is nothing to sum
    double loss = take_logits<T, Gamma, Loss, Grad>(plan.focal, block);
    if constexpr (Loss) {
      leave_sum<2>(loss, plan.partials + plan.box_blocks + blockIdx.x);
    }
  }
  if constexpr (Loss) {
    if (is_last_block(plan.ticket)) {
      add_partials<Real>(plan);
    }
  }
}

cudaError_t make_plan(const Losses& args, Plan* plan) {
  *plan = Plan{};
  int64_t points = args.box.ltrb.num_levels == 0 ? 0 : args.box.num_images * args.box.num_points;
  int64_t box_blocks = divide_up(points, kThreads);
  if (box_blocks > kMaxBlocks || !make_plan(args.focal, &plan->focal) ||
      2 * box_blocks + plan->focal.blocks.total() > kMaxBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  plan->box = args.box;
  plan->box_blocks = int(box_blocks);
  plan->is_saved = args.is_saved;
  plan->focal_loss = args.focal.loss;
  return cudaSuccess;
}

// Calls launch(T{}, integral_constant<Gamma>) for the type of the logits and the exponent. float64 is
// for checking gradients, not for speed.
template <class Launch>
void dispatch(const Losses& args, Launch&& launch) {
  with_type(args.focal.dtype, [&](auto zero) {
    if constexpr (sizeof(zero) < sizeof(double)) {
      if (args.focal.gamma == 2) {
        return launch(zero, std::integral_constant<int, 2>{});
      } else if (args.focal.gamma == 1) {
        return launch(zero, std::integral_constant<int, 1>{});
      } else if (args.focal.gamma == 0) {
        return launch(zero, std::integral_constant<int, 0>{});
      }
    }
    launch(zero, std::integral_constant<int, -1>{});
  });
}

template <bool Loss, bool Grad>
void launch(const Losses& args, const Plan& plan, cudaStream_t stream) {
  int blocks = plan.box_blocks + plan.focal.blocks.total();
  if (Loss) { // without anything to sum, one block writes zeros
    blocks = std::max(blocks, 1);
  }
  if (blocks > 0) {
    dispatch(args, [&](auto zero, auto gamma) {
      loss_kernel<decltype(zero), decltype(gamma)::value, Loss, Grad>
          <<<unsigned(blocks), kThreads, 0, stream>>>(plan);
    });
  }
}

} // namespace

int64_t fcos_loss_partials(const Losses& args) {
  Plan plan;
  bool is_good = args.wants_loss && make_plan(args, &plan) == cudaSuccess;
  return is_good ? std::max(2 * plan.box_blocks + plan.focal.blocks.total(), 1) : 0;
}

cudaError_t launch_fcos_loss(const Losses& args, double* partials, cudaStream_t stream) {
  Plan plan;
  cudaError_t error = make_plan(args, &plan);
  if (error == cudaSuccess && args.wants_loss) {
    plan.partials = partials;
    error = take_ticket(stream, &plan.ticket);
  }
  if (error != cudaSuccess) {
    return error;
  }
  auto chosen = !args.wants_loss      ? launch<false, true>
                : args.wants_gradient ? launch<true, true>
                                      : launch<true, false>;
  chosen(args, plan, stream);
  return cudaGetLastError();
}

} // namespace fcos::cuda
