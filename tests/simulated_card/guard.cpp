// SPDX-License-Identifier: Apache-2.0
// torch built without CUDA asks in vain who guards the current device while a tensor is indexed.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
