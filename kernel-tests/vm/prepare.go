package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// passedOn are the host's variables that the program gets as well.
var passedOn = []string{"GODEBUG", "GOTRACEBACK", "GOMAXPROCS"}

// prepare writes the job: the command, where it runs and what it sees.
func (m *machine) prepare(row string, command []string) error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	m.job = job{Args: command, Dir: dir, Hostname: "guest"}
	if name := command[0]; strings.Contains(name, "/") {
		if m.program, err = filepath.Abs(name); err != nil {
			return err
		}
		m.job.Args = append([]string{filepath.Join(programDir, filepath.Base(name))}, command[1:]...)
	}
	root := moduleRoot(dir)
	shared := filepath.Join(root, "..", "shared")
	fixtures := cmp.Or(os.Getenv("EROFSD_FIXTURES"), filepath.Join(shared, "fixtures", "rafs-v6"))
	folders, mustRun := []string{root}, "root,cachefiles,memory cgroup"
	if isDir(shared) {
		folders = append(folders, shared)
	}
	if isDir(fixtures) {
		folders, mustRun = append(folders, fixtures), mustRun+",fixtures"
	}
	if m.job.Shares, err = shares(append(folders, m.folders...)); err != nil {
		return err
	}
	m.job.Stderr = !sameFile(m.stdout, m.stderr)
	m.job.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LANG=C.UTF-8",
		"TMPDIR=" + filepath.Join(cacheDir, "tmp"), "EROFSD_TEST_DIR=" + cacheDir, "EROFSD_TEST_SMALL_DIR=" + smallDir,
		"EROFSD_GUEST=" + row, "EROFSD_FIXTURES=" + fixtures, "TEST_MUST_RUN=" + mustRun,
	}
	for _, name := range passedOn {
		if value, ok := os.LookupEnv(name); ok {
			m.job.Env = append(m.job.Env, name+"="+value)
		}
	}
	m.job.Env = append(slices.DeleteFunc(m.job.Env, m.sets), m.env...)
	return nil
}

// addShare adds a folder that the guest sees.
func (m *machine) addShare(name string) error {
	if !isDir(name) {
		return errors.New("want a folder")
	}
	m.folders = append(m.folders, name)
	return nil
}

// addEnv adds a variable to the program's environment.
func (m *machine) addEnv(variable string) error {
	if name, _, ok := strings.Cut(variable, "="); !ok || name == "" {
		return errors.New("want NAME=VALUE")
	}
	m.env = append(m.env, variable)
	return nil
}

// sets reports whether an -env names a variable anew: of two, programs take either.
func (m *machine) sets(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return slices.ContainsFunc(m.env, func(own string) bool { return strings.HasPrefix(own, name+"=") })
}

// shares are those of the folders that do not lie in another one.
func shares(folders []string) (list []share, err error) {
	for i, f := range folders {
		if folders[i], err = filepath.Abs(f); err != nil {
			return nil, err
		}
		if strings.ContainsAny(folders[i], ",\n") {
			return nil, fmt.Errorf("%s cannot be shared with a guest: QEMU takes a comma for the end of a path", folders[i])
		}
	}
	for i, f := range folders {
		inside := false
		for k, other := range folders {
			inside = inside || strings.HasPrefix(f, other+"/") || f == other && k < i
		}
		if !inside {
			list = append(list, share{Tag: fmt.Sprintf("share%d", len(list)), Path: f})
		}
	}
	return list, nil
}

// moduleRoot is the folder of the go.mod above dir, or dir itself.
func moduleRoot(dir string) string {
	for at := dir; ; at = filepath.Dir(at) {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return at
		}
		if at == filepath.Dir(at) {
			return dir
		}
	}
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// sameFile says whether both lead to the same place, as below go test: one port for
// both then keeps the order of what is printed.
func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	y, err2 := b.Stat()
	return err == nil && err2 == nil && os.SameFile(x, y)
}

// findKernel returns the path of a row's kernel, or the path that it was given.
func findKernel(ctx context.Context, row string) (string, error) {
	if strings.Contains(row, "/") {
		return filepath.Abs(row)
	}
	kernel, err := guestkernel.Find(ctx, row)
	if err != nil {
		return "", err
	}
	return kernel.Image, nil
}
