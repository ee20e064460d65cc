package main

import (
	"context"
	"net/http"
	neturl "net/url"
	"strings"
	"time"
)

const (
	registryTime = 10 * time.Second
	// mostSkew is how wrong a clock may be: many tokens are valid for five minutes.
	mostSkew = 4 * time.Minute
)

// examineRegistry asks a registry whether it is one. It needs no login for that and sends
// none.
func (d *doctor) examineRegistry(ctx context.Context, host string) {
	url := host
	if !strings.HasPrefix(host, "http://") && !strings.HasPrefix(host, "https://") {
		url = "https://" + host
	}
	if u, err := neturl.Parse(url); err != nil || u.User != nil || u.Host == "" {
		d.add(failure, "registry", "say host, host:port or http://host:port, without a login", "this is no registry's address")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, registryTime)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+"/v2/", nil)
	if err != nil {
		d.add(failure, "registry", "say host, host:port or http://host:port, without a login", "%v", err)
		return
	}
	began := d.now()
	answer, err := d.client.Do(request)
	if err != nil {
		d.add(failure, "registry", remedy(err.Error()), "%s: %v", host, err)
		return
	}
	defer answer.Body.Close()
	if date, err := http.ParseTime(answer.Header.Get("Date")); err == nil {
		if skew := d.now().Sub(date).Round(time.Second); skew.Abs() > mostSkew {
			d.add(warning, "clock", "have it set: timedatectl set-ntp true, or chrony", "it is %v apart from that of %s: logins will be refused", skew.Abs(), host)
		}
	}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusUnauthorized:
		d.add(fine, "registry", "", "%s answers after %v", host, d.now().Sub(began).Round(time.Millisecond))
	case http.StatusForbidden:
		d.add(warning, "registry", "look whether a proxy, or a list of addresses, keeps this machine out", "%s: %s", host, answer.Status)
	default:
		d.add(failure, "registry", "look whether it is a registry, and what stands before it", "%s: %s at /v2/", host, answer.Status)
	}
}

// remedy is what to do about an error of a connection.
func remedy(text string) string {
	for _, r := range []struct{ says, do string }{
		{"certificate", "name its authority in backend.ca_files, or in hosts.toml (backend.hosts_dir)"},
		{"HTTP response to HTTPS", "it speaks plain HTTP: backend.plain_http, and http://host:port here"},
		{"no such host", "look at its name and at /etc/resolv.conf"},
		{"connection refused", "look at the port, and whether it runs"},
	} {
		if strings.Contains(text, r.says) {
			return r.do
		}
	}
	return "look at the network between, and at HTTPS_PROXY and NO_PROXY of the services"
}
