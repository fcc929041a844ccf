// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#pragma once

// Loads the modules of /modules in the order that /modules/order says.
void load_modules(void);
