package guestkernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// recipe are the steps of a build, run by sh in the unpacked source with the row's
// configuration in $1. It is part of a kernel's key.
const recipe = `make -s tinyconfig && scripts/kconfig/merge_config.sh -m .config "$1" && make -s olddefconfig`

// build makes the kernel k: its configuration first, then its image, which stands for
// all of it.
func build(ctx context.Context, row string, k *Kernel, progress func(string)) (err error) {
	begin := time.Now()
	progress(fmt.Sprintf("building guest kernel %s in %s (5 to 10 minutes, once)", row, filepath.Dir(k.Image)))
	src, err := os.MkdirTemp("", "erofsd-kernel-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(src)) }()
	if err := run(ctx, src, "tar", "-xf", source(row), "--strip-components=1"); err != nil {
		return err
	}
	wanted, err := fragments(row)
	if err != nil {
		return err
	}
	fragment := filepath.Join(src, "erofsd.config")
	if err := os.WriteFile(fragment, wanted, 0o644); err != nil {
		return err
	}
	if err := run(ctx, src, "sh", "-ec", recipe, "sh", fragment); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(src, ".config"))
	if err != nil {
		return err
	}
	if missing := unmet(wanted, config); len(missing) > 0 {
		return fmt.Errorf("this source does not accept %s: see which options they depend on", strings.Join(missing, ", "))
	}
	progress("guest kernel " + row + ": compiling")
	if err := run(ctx, src, "make", "-s", fmt.Sprintf("-j%d", runtime.NumCPU()), "bzImage"); err != nil {
		return err
	}
	if err := os.WriteFile(k.Config, config, 0o644); err != nil {
		return err
	}
	if err := place(filepath.Join(src, "arch/x86/boot/bzImage"), k.Image); err != nil {
		return err
	}
	progress(fmt.Sprintf("guest kernel %s: built in %s", row, time.Since(begin).Round(time.Second)))
	return nil
}

// unmet returns the lines of the configuration wanted that got has not. An option
// that shall be off may also be unknown.
func unmet(wanted, got []byte) (missing []string) {
	lines := make(map[string]bool)
	on := make(map[string]bool)
	for line := range strings.Lines(string(got)) {
		line = strings.TrimSpace(line)
		lines[line] = true
		if name, _, ok := strings.Cut(line, "="); ok {
			on[name] = true
		}
	}
	for line := range strings.Lines(string(wanted)) {
		line = strings.TrimSpace(line)
		off, isOff := strings.CutSuffix(line, " is not set")
		switch {
		case isOff && on[strings.TrimPrefix(off, "# ")], strings.HasPrefix(line, "CONFIG_") && !lines[line]:
			missing = append(missing, line)
		}
	}
	return missing
}

// run runs a command in dir, in a way that leaves tests beside it their time. When ctx
// ends, the command and its children are killed.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, "nice", append([]string{name}, args...)...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		out = bytes.TrimSpace(out)
		return fmt.Errorf("%s: %w\n%s", name, errors.Join(ctx.Err(), err), out[max(0, len(out)-2000):])
	}
	return nil
}

// place copies a file so that its new name appears only when it is complete.
func place(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	part := to + ".part"
	dst, err := os.Create(part)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Close()); err != nil {
		return errors.Join(fmt.Errorf("copy to %s: %w", part, err), os.Remove(part))
	}
	return os.Rename(part, to)
}
