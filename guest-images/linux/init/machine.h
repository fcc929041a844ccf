// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Architecture-specific parts: one file each.
#pragma once

// Ends the machine with this status, if it has a device for that; returns if not.
void exit_machine(unsigned char status);
