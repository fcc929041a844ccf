// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors opened by operations of Linux's selftests. Programs only close them, or pass them to
//! other operations.

use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage_emulated::uapi::TestFile;

use crate::files::file::{Answer, Call, Caller, File};

/// An open file of a test operation.
#[derive(Debug)]
pub struct OpenTestFile(pub Arc<dyn TestFile>);

impl File for OpenTestFile {
    fn name(&self) -> String {
        self.0.name().to_owned()
    }

    fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
        Err(Errno::EINVAL)
    }

    fn as_test_file(&self) -> Option<&Arc<dyn TestFile>> {
        Some(&self.0)
    }
}
