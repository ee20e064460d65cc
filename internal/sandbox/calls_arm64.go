package sandbox

import "golang.org/x/sys/unix"

// auditArch is what the kernel calls this architecture.
const auditArch = uint32(unix.AUDIT_ARCH_AARCH64)

// architectureCalls are those that not every architecture has.
func architectureCalls() []uint32 { return []uint32{unix.SYS_KEXEC_FILE_LOAD} }
