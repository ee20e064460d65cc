package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// landlockABI returns the version of Landlock that this kernel has.
func landlockABI() (int, error) {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errno == unix.ENOSYS:
		return 0, errors.New("this kernel has none (Linux 5.13, CONFIG_SECURITY_LANDLOCK)")
	case errno == unix.EOPNOTSUPP:
		return 0, errors.New("it is switched off (add landlock to the kernel's parameter lsm=)")
	case errno != 0:
		return 0, errno
	}
	return int(abi), nil
}

func landlockName(abi int) string { return fmt.Sprintf("landlock %d", abi) }

// threadSignals is the bit of the fix that lets threads of one process signal each other
// though each has a domain of its own (Linux 6.15, erratum 2); the Go runtime has to.
const threadSignals = 1 << 1

// Versions of Landlock that brought something.
const (
	abiRefer    = 2
	abiTruncate = 3
	abiDevices  = 5
	abiScopes   = 6
	abiTSync    = 8
)

// changes are the rights to change files that Landlock knows of.
func changes(abi int) uint64 {
	rights := uint64(unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_SYM)
	if abi >= abiRefer {
		rights |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= abiTruncate {
		rights |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= abiDevices {
		rights |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	return rights
}

// scopes are what must not be reached of other processes.
func scopes(abi int, o Options) (s uint64) {
	if abi < abiScopes {
		return 0
	}
	if !o.UnixSockets {
		s |= unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
	}
	fixed, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_ERRATA)
	if abi >= abiTSync || errno == 0 && fixed&threadSignals != 0 {
		s |= unix.LANDLOCK_SCOPE_SIGNAL
	}
	return s
}

// restrictFiles lets the process change files only where o says, and signal no process but
// those that it starts from now on.
func restrictFiles(abi int, o Options) (err error) {
	all := changes(abi)
	attr := unix.LandlockRulesetAttr{Handled_access_fs: all, Scoped: scopes(abi, o)}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("make a rule set: %w", errno)
	}
	rules := int(fd)
	defer func() { err = errors.Join(err, unix.Close(rules)) }()
	for _, dir := range o.Writable {
		if err := allow(rules, dir, all); err != nil {
			return err
		}
	}
	for _, dir := range o.Removable {
		if err := allow(rules, dir, unix.LANDLOCK_ACCESS_FS_REMOVE_FILE|unix.LANDLOCK_ACCESS_FS_REMOVE_DIR); err != nil {
			return err
		}
	}
	// Where programs that it starts, credential helpers, send what nobody wants.
	file := uint64(unix.LANDLOCK_ACCESS_FS_WRITE_FILE|unix.LANDLOCK_ACCESS_FS_TRUNCATE) & all
	if err := allow(rules, "/dev/null", file); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if abi >= abiTSync {
		_, _, errno = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, unix.LANDLOCK_RESTRICT_SELF_TSYNC, 0)
		if errno != 0 {
			return fmt.Errorf("restrict all threads: %w", errno)
		}
		return nil
	}
	if _, err := allThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0); err != nil {
		return fmt.Errorf("restrict every thread: %w", err)
	}
	return nil
}

// allow adds the rule that gives rights beneath path.
func allow(rules int, path string, rights uint64) (err error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	rule := &unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(rules), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(rule)), 0, 0, 0)
	runtime.KeepAlive(rule)
	if errno != 0 {
		return fmt.Errorf("allow changes beneath %s: %w", path, errno)
	}
	return nil
}
