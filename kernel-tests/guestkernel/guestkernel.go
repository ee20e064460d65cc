// Package guestkernel builds the kernels that kernel-tests/vm boots, from Debian's
// source packages, with a configuration that has what distributions leave out:
// cachefiles and EROFS on demand. Each is built once and kept outside of the checkout.
package guestkernel

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

// Rows are the kernels that there are. A row is the version in the name of Debian's
// package, linux-source-ROW, and of the row's own configuration, ROW.config.
var Rows = []string{"6.1", "6.12"}

// Kernel is one that has been built.
type Kernel struct {
	Image  string // path of the bzImage
	Config string // path of its .config
}

//go:embed *.config
var configs embed.FS

// fragments returns the row's configuration: the common one, then its own.
func fragments(row string) ([]byte, error) {
	if !slices.Contains(Rows, row) {
		return nil, fmt.Errorf("there is no guest kernel %q: use one of %s", row, strings.Join(Rows, ", "))
	}
	common, err := configs.ReadFile("guest.config")
	if err != nil {
		return nil, err
	}
	own, err := configs.ReadFile(row + ".config")
	return slices.Concat(common, own), err
}

// tools are what a build needs: programs, and a file of each package without one.
func tools(row string) []debian.Tool {
	return []debian.Tool{
		{Program: source(row), Package: "linux-source-" + row},
		{Program: "make", Package: "make"},
		{Program: "gcc", Package: "gcc"},
		{Program: "/usr/include/stdio.h", Package: "libc6-dev"},
		{Program: "flex", Package: "flex"},
		{Program: "bison", Package: "bison"},
		{Program: "bc", Package: "bc"},
		{Program: "/usr/include/libelf.h", Package: "libelf-dev"},
		{Program: "/usr/include/openssl/ssl.h", Package: "libssl-dev"},
		{Program: "xz", Package: "xz-utils"},
		debian.Cpio,
		debian.Tar,
		debian.Zstd,
	}
}

// source is the tar file of the row's Debian package.
func source(row string) string { return "/usr/src/linux-source-" + row + ".tar.xz" }

// Find returns the row's kernel if it has been built. Otherwise the error is an
// fs.ErrNotExist that says how to build it.
func Find(ctx context.Context, row string) (*Kernel, error) {
	k, err := locate(ctx, row)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		_, err = os.Stat(k.Image)
	}
	if err != nil {
		return nil, fmt.Errorf("guest kernel %s has not been built, make kernel KERNEL=%s does it: %w", row, row, err)
	}
	return k, nil
}

// Build returns the row's kernel and makes it first when there is none in the cache:
// that takes 5 to 10 minutes on two processors, and progress is told every step.
// Several processes may call it at once. A machine that is no amd64 gets an
// errors.ErrUnsupported, one without the packages, and no way to install them, a
// debian.ErrMissing.
func Build(ctx context.Context, row string, progress func(string)) (*Kernel, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("build guest kernel %s on %s, there is a configuration only for amd64: %w", row, runtime.GOARCH, errors.ErrUnsupported)
	}
	if k, err := Find(ctx, row); err == nil {
		return k, nil
	}
	if _, err := fragments(row); err != nil {
		return nil, err
	}
	if err := debian.Ensure(ctx, progress, tools(row)...); err != nil {
		return nil, fmt.Errorf("build guest kernel %s: %w", row, err)
	}
	k, err := locate(ctx, row)
	if err != nil {
		return nil, fmt.Errorf("build guest kernel %s: %w", row, err)
	}
	dir := filepath.Dir(k.Image)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(k.Image); err == nil {
		return k, nil // another process has built it meanwhile
	}
	if err := build(ctx, row, k, progress); err != nil {
		return nil, fmt.Errorf("build guest kernel %s: %w", row, err)
	}
	return k, nil
}

// locate says where the row's kernel is kept, by what it is made of.
func locate(ctx context.Context, row string) (*Kernel, error) {
	config, err := fragments(row)
	if err != nil {
		return nil, err
	}
	version, err := debian.Version(ctx, "linux-source-"+row)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(rootfs.CacheDir(), "kernel-"+row+"-"+key(version, config))
	return &Kernel{Image: filepath.Join(dir, "bzImage"), Config: filepath.Join(dir, "config")}, nil
}

// key names what a kernel is made of: the version of its source, the configuration
// and how it is built.
func key(version string, config []byte) string {
	sum := sha256.Sum256([]byte(version + "\x00" + string(config) + "\x00" + recipe))
	return hex.EncodeToString(sum[:6])
}

// lock takes the lock file name for this process. Another one that builds may hold it
// for minutes.
func lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for the lock %s: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}
