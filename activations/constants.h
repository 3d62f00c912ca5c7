#pragma once

// The numbers of the non-linearities, for whoever computes them: ATen's calls (activation.cpp) and TorchScript
// (patch/graph/activation_source.cpp).
namespace torchgraft {

constexpr double kLeakySlope = 0.01;
constexpr double kQuickGeluSlope = 1.702;
constexpr double kGeluClip = 10.0;
// The Laplace activation of MEGA (Ma et al. 2022, section 3.5).
constexpr double kLaplaceMean = 0.707107;
constexpr double kLaplaceDeviation = 0.282095;

}  // namespace torchgraft
